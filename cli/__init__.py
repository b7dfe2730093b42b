"""The command line: one thin file per command; heavy rooms are imported inside the function."""
