"""Documents in a pack: their boundaries, and how samples become one."""
