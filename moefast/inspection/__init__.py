"""Single stars, and runs without labels, looked at: what is known of them in numbers, words and pictures."""
