"""Environments behind a server, from the client's side: the wire format and a Gymnasium environment over HTTP."""
