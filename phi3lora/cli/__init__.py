"""The command line: options made from the settings' fields, and one function for each command."""
