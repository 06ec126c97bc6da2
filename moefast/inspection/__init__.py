"""Files of spectra, single stars and runs without labels, looked at: what is known of them in numbers and pictures."""
