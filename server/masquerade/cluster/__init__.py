"""Replicas of a server on Ray Serve: an ingress in front of them, and a router by persona. Needs the extra `ray`."""
