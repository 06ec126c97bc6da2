"""What astronomers fit labels with otherwise: a model of the spectrum and least squares, star by star.

`full_spectrum` fits the simulator's own emulator, `cannon` a quadratic model of labelled spectra; `least_squares` is
what both do with a star, and `choose` names them.
"""
