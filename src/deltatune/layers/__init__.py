"""Decoder layers that honour document boundaries: subclasses of the stock layers, sharing their Parameters."""
