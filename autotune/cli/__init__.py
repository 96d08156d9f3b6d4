"""The commands: parse, build one request, call, print."""
