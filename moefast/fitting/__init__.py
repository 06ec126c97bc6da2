"""From spectra, in files or simulated, to a fitted mixture in two passes.

Design: the first pass gathers normal equations per bin and fold. Everything linear follows from them: the noise-white
principal components, experts at every noise level, their penalties by cross-validation, the reference fits. The second
pass reads a bounded sample of rows, gives each a few noise draws and the predictions of experts that never saw it,
and trains gate and error model on those. Time grows linearly with rows, memory not at all. The first pass, which takes
nearly all of the time of a large fit, can be kept in a checkpoint.

`two_passes` puts the stages in order; each is a function of the training set and of what the stages before it made.
From the top down:

    two_passes      the order of the stages, and what a fit says of itself
    references      simpler fits to compare with
    gate, residuals, error_model      what is trained on the sample
    families, network                 experts that are not linear
    sample          noise draws of stars, and what experts that never saw them say
    linear_experts  components, noise levels and linear experts from the normal equations
    first_pass      the normal equations of all rows, or of a part
    statistics      what a part of the rows gives; parts add
    training_set    rows as every stage reads them, and which of them are for what
    stages          about how long each of them takes
    options         how to fit
"""

from moefast.fitting.options import Noise, Options
from moefast.fitting.references import PUBLISHED_ALPHA
from moefast.fitting.stages import expected_stages
from moefast.fitting.two_passes import HERE, Fit, Passes, fit_mixture

__all__ = [
    "HERE", "PUBLISHED_ALPHA", "Fit", "Noise", "Options", "Passes", "expected_stages", "fit_mixture",
]  # fmt: skip
