"""The demo app, which is also the Space's, and the server."""
