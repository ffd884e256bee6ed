"""Tables and figures. Reads records; needs no torch."""
