"""Speed next to accuracy: our engines and other people's, on the same data, giving the same answer."""
