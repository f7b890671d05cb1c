"""The model server on the device: a child process of the agent, and the agent's end of it."""
