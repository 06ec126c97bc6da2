"""Arrays in, arrays out: the numerical kernels of moefast.

Design: a public function checks its arguments, allocates what it returns and calls one compiled kernel. The float64
contract of each is in `moefast.kernels.reference`. Nothing here knows files, models or the command line.
"""

from moefast.kernels.binning import assign_bins, assign_snr_bins, sort_by_bin
from moefast.kernels.clouds import CloudPosterior, Clouds, Groups, Space, cloud_posterior, without_cuda
from moefast.kernels.forest import Forest, forest_predict
from moefast.kernels.gram import (
    GRAM_ROWS,
    add_gram,
    all_within,
    collect_rows,
    normal_equations,
    packed_size,
    unpack_symmetric,
)
from moefast.kernels.likelihood import gaussian_log_likelihood
from moefast.kernels.scoring import (
    PROJECT_ROWS,
    Given,
    Mixed,
    Mixing,
    Projected,
    Projection,
    cell_size,
    perceptron,
    project,
    soft_mix,
)
from moefast.kernels.tangent import Library, TangentPosterior, tangent_posterior
from moefast.kernels.template import TemplatePosterior, template_posterior
from moefast.kernels.velocity import (
    Slopes,
    VelocityTemplates,
    velocity_conclusion,
    velocity_evidence,
    velocity_step,
)

__all__ = [
    "GRAM_ROWS",
    "PROJECT_ROWS",
    "CloudPosterior",
    "Clouds",
    "Forest",
    "Given",
    "Groups",
    "Library",
    "Mixed",
    "Mixing",
    "Projected",
    "Projection",
    "Slopes",
    "Space",
    "TangentPosterior",
    "TemplatePosterior",
    "VelocityTemplates",
    "add_gram",
    "all_within",
    "assign_bins",
    "assign_snr_bins",
    "cell_size",
    "cloud_posterior",
    "collect_rows",
    "forest_predict",
    "gaussian_log_likelihood",
    "normal_equations",
    "packed_size",
    "perceptron",
    "project",
    "soft_mix",
    "sort_by_bin",
    "tangent_posterior",
    "template_posterior",
    "unpack_symmetric",
    "velocity_conclusion",
    "velocity_evidence",
    "velocity_step",
    "without_cuda",
]
