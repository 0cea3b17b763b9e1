"""One module a task: how its model is loaded, and how any callable is scored on it."""
