"""The model families: data about which stock module becomes which layer, and what is supported there."""
