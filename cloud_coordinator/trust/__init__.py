"""Trust: the TUF metadata that say which files devices may serve, who signs them, until when."""
