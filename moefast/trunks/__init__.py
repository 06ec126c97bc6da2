"""Networks with a shared trunk and a head per bin: described once, fitted by torch, scored without it."""
