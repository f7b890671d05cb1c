"""What operators type: clients of the REST API, one module for each noun."""
