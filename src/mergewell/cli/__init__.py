"""The command line; imports no torch until it must."""
