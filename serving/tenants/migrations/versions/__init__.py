"""One file a change; a change adds, so that gateways of the version before go on working beside it."""
