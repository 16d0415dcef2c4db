"""The demo: a small model made from nothing, taught to answer questions about texts it has never seen."""
