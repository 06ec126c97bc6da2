"""The posterior of a star's labels at the star's own noise, gaps and scale."""

from moefast.posterior.forward import Sizes, forward
from moefast.posterior.library import fit_clouds
from moefast.posterior.mixture import LABELS, PosteriorMixture
from moefast.posterior.nuisances import sky_residuals, slopes

__all__ = ["LABELS", "PosteriorMixture", "Sizes", "fit_clouds", "forward", "sky_residuals", "slopes"]
