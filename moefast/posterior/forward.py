"""The forward pass from flux and error to the posterior of the labels, described once on an arithmetic.

With clean spectra x = c (r + G ζ + N η), r the reference spectrum, G (p, n) the coordinates of spectra, N (p, q) linear
nuisances, c the scale of the flux, and a = 1/σ² per pixel (0 where the pixel is bad):

    c₀ = Σ a x r / Σ a r²,      a′ = c₀² a,      y = a′ (x/c₀ − r),
    u = Bᵀy,    M = Bᵀ diag(a′) B,    B = [G N]                        all that the star says of (ζ, η),
    u ← u_ζ − M_ζη (H + M_ηη)⁻¹ u_η,   M ← M_ζζ − M_ζη (H + M_ηη)⁻¹ M_ηζ    nuisances marginalised,
    M₁ = (I + M)⁻¹ M,   u₁ = (I + M)⁻¹ u                             spread of spectra within a cloud marginalised.

H is diagonal: 1 for a nuisance with a prior width of its own, 1/s² for one that grows with the noise s of the star, s²
the mean of σ²/(c₀² D) over good pixels: what sky subtraction leaves of a line is a share of its light, as the noise is.

Some spectra are calibrated well, others are not, and which one a star's is, its spectrum tells. The first κ nuisances,
the slopes, have the prior π N(0, ω²) + (1 − π) N(0, 1), with the share π of spectra whose slopes are only ω wide, each
its own ω_i. The library as a few Gaussians N(b_g, P_g) of shares π_g, three for stars alike in T_eff and one for
what is no star, with r and R what is left of u and M for the slopes alone when all else is marginalised, gives the
evidence of widths w = diag(w_i)

    E_w = Σ_g π_g |P_g⁻¹|^½ |S_g|^−½ exp(½ (v_gᵀS_g⁻¹v_g − b_gᵀP_g⁻¹b_g)) · |A_g|^−½ exp(½ (w r_g)ᵀA_g⁻¹(w r_g)),
    A_g = 1 + w R_g w,   S_g = P_g⁻¹ + M,   v_g = u + P_g⁻¹b_g     of coordinates and what grows with the noise,

τ = π E_ω / (π E_ω + (1 − π) E_1) as the probability of narrow slopes, and H_i = 1/(1 − τ + τ ω_i²): a star that cannot
tell keeps wide slopes. Groups are their own in some coordinates, and the whole library in all others given these: what
they have in common need be taken out only once (`moefast.kernels.cpu_information.chance_of_narrow`).

Coordinates are scaled such that spectra scatter within a cloud by the identity in the directions that the cloud's own
tangents leave out. Cloud j has a mean k_j and t tangents, rows of T_j (t, n), along which its spectra scatter by one,
and one direction more, the change of its mean spectrum with the scale. Its evidence and what it says of label l are

    h = u₁ − M₁ k_j,  ρ = T_j h,  A = I + T_j M₁ T_jᵀ,  γ = A⁻¹ ρ,
    e_j = ln π_j + ½ k_jᵀ(u₁ + h) + ½ ρᵀγ − ½ ln det A,
    mean_jl = y_jl + γᵀ g_jl,    cov_jlm = S_jlm − g_jlᵀ g_jm + g_jlᵀ A⁻¹ g_jm,

and the posterior is the mixture of all clouds with weights exp e_j. There is no ln σ² term: the noise is a known weight
and says nothing by itself, though it holds the photons of the star.

Design: M is made of averages of a′ over cells of alike pixels (`moefast.posterior.cells`), in units of the training
set's mean noise, so that it is one small matrix product; cells of one pixel are exact. An M that is off by a per cent
would be off by many σ for a star far from the reference. Therefore the likelihood is expanded around a point b near
the star, where its gradient is exact, and M weighs only what lies between b and the clouds: with the whole library and
the nuisances as one Gaussian N(b₀, P),

    b = (P⁻¹ + M)⁻¹ (P⁻¹b₀ + u),      u ← Bᵀ(y − a′ B b) + M b,

which changes nothing where M is exact. From u on everything is in double precision. The fast CPU kernels
(`moefast.kernels.clouds`) are judged by this description, read in NumPy and float64; ONNX is a second reader of it.

Sources: information form of a Gaussian likelihood, e.g. Bishop 2006, section 2.3; mixtures of factor analysers,
Ghahramani & Hinton 1996.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefast.kernels.quality import LARGEST_ERROR
from moefast.ops.arithmetic import SolvingArithmetic
from moefast.posterior.correction import LEAST_SPREAD, corrected

__all__ = ["LEAST_CURVATURE", "Sizes", "cell_products", "forward"]

LARGEST_FLUX = 3.4028234663852886e38
"""Of float32: infinite flux is no flux."""
TINY = 1e-30
LEAST_CURVATURE = 1e-8
"""Added to M where the best point of the whole space is asked for: directions that a star does not see stay put."""


@dataclass(frozen=True)
class Sizes:
    """The shapes that the description needs.

    Attributes
    ----------
    n_pixels, n_cells, cell : int
        p; number of cells over which a′ is averaged for M, and places for pixels in each.
    n_coordinates, n_nuisances : int
        n, q. The last coordinate is the scale.
    n_clouds, n_tangents, n_labels, n_experts : int
        m, t (the direction of the scale included), l (the scale included), K.
    n_slopes, n_groups : int
        κ, and Gaussians that tell the width of the slopes; 0 of them where all slopes are as wide.
    corrects : bool
        Whether a network corrects log g (`moefast.posterior.correction`).
    """

    n_pixels: int
    n_cells: int
    cell: int
    n_coordinates: int
    n_nuisances: int
    n_clouds: int
    n_tangents: int
    n_labels: int
    n_experts: int
    n_slopes: int = 0
    n_groups: int = 0
    corrects: bool = False


@dataclass(frozen=True)
class CloudValues:
    """What n stars say, cloud by cloud: the middle of the forward pass, from which labels and spectra follow.

    Attributes
    ----------
    matrix, vector : values of shape (n, n + q, n + q) and (n, n + q, 1)
        M and u of coordinates and nuisances together, expanded around a point near the star.
    prior : value of shape (n, q, q), or None
        H, the prior precision of the nuisances; None where there are none.
    smoothing : value of shape (n, n, n)
        (I + M)⁻¹ with the nuisances marginalised.
    smoothed : value of shape (n, n, 1)
        u₁.
    point : value of shape (n, n + q, 1)
        b, around which the likelihood is expanded.
    evidence : value of shape (n, m)
    inverse : value of shape (n, m, t, t)
        A⁻¹.
    coefficients : value of shape (n, m, t, 1)
        γ.
    energy, explained, distance, strength, scale, level2, n_good : values of shape (n, 1)
        Energy of the flux around the reference, and the part of it that the best free point explains; the others as
        `forward` gives them, with level2 the mean of σ²/(c₀² D), and distance not divided by n.
    """

    matrix: Any
    vector: Any
    prior: Any
    smoothing: Any
    smoothed: Any
    point: Any
    evidence: Any
    inverse: Any
    coefficients: Any
    energy: Any
    explained: Any
    distance: Any
    strength: Any
    scale: Any
    level2: Any
    n_good: Any


def cell_products(op: SolvingArithmetic, sizes: Sizes) -> Any:
    """Σ B B'/D over the pixels of each cell, (cells, (n + q)²): what turns means of a′ D into M."""
    width = sizes.n_coordinates + sizes.n_nuisances
    size = (sizes.n_cells, sizes.cell)
    inside = op.picked(op.precise(op.number("directions")), op.number("cells"), 0)
    shape = op.reshaped(op.picked(op.precise(op.number("noise_shape")), op.number("cells"), 0), (*size, 1))
    # Places without a pixel have no share.
    there = op.at_most(op.constant(TINY), op.reshaped(op.number("cell_shares"), (*size, 1)))
    inside = op.reshaped(inside, (*size, width))
    inside = op.where(there, inside, op.precise(op.constant(0.0)))
    products = op.product(op.ordered(op.divide(inside, shape), (0, 2, 1)), inside)
    return op.reshaped(products, (sizes.n_cells, width * width))


def cloud_values(op: SolvingArithmetic, sizes: Sizes, flux: Any, error: Any) -> CloudValues:
    """What n stars say of every cloud; arguments as those of `forward`."""
    p, n, q = sizes.n_pixels, sizes.n_coordinates, sizes.n_nuisances
    m, t = sizes.n_clouds, sizes.n_tangents
    number, constant = op.number, op.constant

    # -- pixels ------------------------------------------------------------------------------------------------
    finite = op.at_most(op.absolute(flux), constant(LARGEST_FLUX))
    positive = op.at_most(constant(TINY), error)
    known = op.at_most(error, constant(LARGEST_ERROR))
    good = op.both(finite, op.both(positive, known))
    # Double precision from here on: single precision holds neither squares in all units nor a bright star's digits.
    zero, one = op.precise(constant(0.0)), op.precise(constant(1.0))
    x = op.where(good, op.precise(flux), zero)
    sigma = op.where(good, op.precise(error), one)
    variance = op.multiply(sigma, sigma)
    weight = op.divide(op.where(good, one, zero), variance)
    shape = op.precise(number("noise_shape"))
    relative = op.multiply(weight, shape)
    n_good = op.total(op.where(good, one, zero), 1)
    level = op.total(op.where(good, op.divide(variance, shape), zero), 1)

    def tall(value: Any) -> Any:
        return op.shaped(value, (1,))

    # -- scale -------------------------------------------------------------------------------------------------
    reference, tiny = op.precise(number("reference")), op.precise(constant(TINY))
    weighed = op.multiply(weight, reference)
    curvature = op.add(tall(op.total(op.multiply(weighed, reference), 1)), tiny)
    overlap = tall(op.total(op.multiply(weighed, x), 1))
    error_of_scale = op.root(curvature)
    strength = op.divide(overlap, error_of_scale)
    # At least one standard error: the scale of a spectrum of pure noise must not be divided by.
    scale = op.divide(op.add(error_of_scale, op.relu(op.subtract(overlap, error_of_scale))), curvature)

    # -- information -------------------------------------------------------------------------------------------
    apart = op.where(good, op.subtract(x, op.multiply(scale, reference)), zero)
    energy = tall(op.total(op.multiply(weight, op.multiply(apart, apart)), 1))
    y = op.multiply(scale, op.multiply(weight, apart))
    directions = op.precise(number("directions"))
    u = op.product(y, directions)
    cells = op.shaped(op.picked(relative, number("cells"), 1), (sizes.n_cells, sizes.cell))
    cells = op.multiply(cells, op.reshaped(op.precise(number("cell_shares")), (1, sizes.n_cells, sizes.cell)))
    cells = op.multiply(op.total(cells, 2), op.multiply(scale, scale))
    products = cell_products(op, sizes)
    matrix = op.shaped(op.product(cells, products), (n + q, n + q))
    u = gathered = op.shaped(u, (n + q, 1))

    # -- expansion around a point near the star ----------------------------------------------------------------
    whole, _ = op.inverse(op.add(matrix, op.precise(number("library_precision"))), n + q)
    pull, curvatures = op.precise(number("library_pull")), op.multiply(op.multiply(scale, scale), weight)
    near = op.product(whole, op.add(u, pull))
    spectrum = op.shaped(op.product(directions, near), (p,))
    left = op.subtract(y, op.multiply(curvatures, spectrum))
    gradient = op.shaped(op.product(left, directions), (n + q, 1))
    u = op.add(gradient, op.product(matrix, near))
    moved = op.product(op.ordered(near, (0, 2, 1)), op.subtract(u, gathered))
    energy = op.add(energy, op.shaped(moved, (1,)))

    counted = tall(n_good)
    mean_level = op.divide(tall(level), op.add(counted, tiny))
    level2 = op.divide(mean_level, op.multiply(scale, scale))

    # -- nuisances, and the spread within clouds ---------------------------------------------------------------
    information, vector = op.part(op.part(matrix, 1, 0, n), 2, 0, n), op.part(u, 1, 0, n)
    explained, prior = zero, None
    if q:
        follows = op.precise(number("follows_noise"))
        steady = op.subtract(one, follows)
        sky = op.divide(follows, op.add(level2, tiny))
        if sizes.n_groups:
            steady = op.multiply(steady, _slope_precision(op, sizes, matrix, u, sky))
        precision = op.shaped(op.add(steady, sky), (1, q))
        prior = op.multiply(op.precise(number("unit_nuisances")), precision)
        own = op.add(op.part(op.part(matrix, 1, n, n + q), 2, n, n + q), prior)
        inverse, _ = op.inverse(own, q)
        cross = op.product(op.part(op.part(matrix, 1, 0, n), 2, n, n + q), inverse)
        other = op.part(u, 1, n, n + q)
        explained = op.shaped(op.product(op.ordered(other, (0, 2, 1)), op.product(inverse, other)), (1,))
        vector = op.subtract(vector, op.product(cross, other))
        information = op.subtract(
            information, op.product(cross, op.part(op.part(matrix, 1, n, n + q), 2, 0, n))
        )
    unit = op.precise(number("unit_coordinates"))
    free, _ = op.inverse(op.add(information, op.multiply(unit, op.precise(constant(LEAST_CURVATURE)))), n)
    point = op.product(free, vector)
    gain = op.shaped(op.product(op.ordered(vector, (0, 2, 1)), point), (1,))
    explained = op.add(explained, gain)
    smoothing, _ = op.inverse(op.add(information, unit), n)
    u1, m1 = op.product(smoothing, vector), op.product(smoothing, information)
    # The best free point gains as much under M₁, u₁: ½ u₁ᵀ M₁⁻¹ u₁ = ½ (uᵀ M⁻¹ u − uᵀ (I + M)⁻¹ u).
    gain = op.subtract(gain, op.shaped(op.product(op.ordered(vector, (0, 2, 1)), u1), (1,)))

    # -- clouds ------------------------------------------------------------------------------------------------
    keys = op.precise(number("keys_transposed"))  # (n, m)
    ahead = op.subtract(u1, op.product(m1, keys))  # h, (·, n, m)
    half = op.precise(constant(0.5))
    value = op.multiply(half, op.total(op.multiply(keys, op.add(u1, ahead)), 1))  # (·, m)
    tangents = op.precise(number("tangents"))  # (m, t, n)
    along = op.product(tangents, op.shaped(op.ordered(ahead, (0, 2, 1)), (m, n, 1)))  # ρ, (·, m, t, 1)
    rows = op.shaped(op.product(op.reshaped(tangents, (m * t, n)), m1), (m, t, n))
    curved = op.product(rows, op.precise(number("tangents_transposed")))  # T M₁ Tᵀ, (·, m, t, t)
    inverse, log_determinant = op.inverse(op.add(curved, op.precise(number("unit_tangents"))), t)
    coefficients = op.product(inverse, along)  # γ, (·, m, t, 1)
    gained = op.shaped(op.total(op.multiply(along, coefficients), 2), (m,))
    nearest = op.add(value, op.multiply(half, gained))
    evidence = op.add(
        op.precise(number("log_weights")), op.subtract(nearest, op.multiply(half, log_determinant))
    )
    distance = op.subtract(gain, op.multiply(op.precise(constant(2.0)), op.largest(nearest, 1)))

    return CloudValues(
        matrix=matrix,
        vector=u,
        prior=prior,
        smoothing=smoothing,
        smoothed=u1,
        point=near,
        evidence=evidence,
        inverse=inverse,
        coefficients=coefficients,
        energy=energy,
        explained=explained,
        distance=distance,
        strength=strength,
        scale=scale,
        level2=level2,
        n_good=counted,
    )


def _slope_precision(op: SolvingArithmetic, sizes: Sizes, matrix: Any, u: Any, sky: Any) -> Any:
    """H of the slopes, (n, q) and 1 behind them, from M, u and what else H holds, 0 for slopes; see the module."""
    width, k = sizes.n_coordinates + sizes.n_nuisances, sizes.n_slopes
    rest = width - k
    one, half = op.precise(op.constant(1.0)), op.precise(op.constant(0.5))
    share, widths = (
        op.part(op.precise(op.number("calibrated")), 0, 0, 1),
        op.precise(op.number("narrow_slopes")),
    )
    row = op.product(op.shaped(sky, (1, sizes.n_nuisances)), op.precise(op.number("behind_coordinates")))
    matrix = op.add(matrix, op.multiply(op.precise(op.number("unit_directions")), row))
    last = op.number("slopes_last")
    rows = op.picked(op.picked(matrix, last, 1), last, 2)
    above, slope_rows = op.part(rows, 1, 0, rest), op.part(rows, 1, rest, width)
    inside, cross = op.part(above, 2, 0, rest), op.part(above, 2, rest, width)
    own = op.part(slope_rows, 2, rest, width)
    u = op.picked(u, last, 1)
    vector, pulled = op.part(u, 1, 0, rest), op.part(u, 1, rest, width)
    unit = op.precise(op.number("unit_slopes"))
    of_wide: list[Any] = []
    of_narrow: list[Any] = []
    for group in range(sizes.n_groups):
        precision, pull, constant = (
            op.reshaped(op.part(op.number(f"group_{name}"), 0, group, group + 1), shape)
            for name, shape in (("precision", (rest, rest)), ("pull", (rest, 1)), ("constant", (1,)))
        )
        inverse, log_determinant = op.inverse(op.add(inside, precision), rest)
        seen = op.add(vector, pull)
        through = op.product(op.ordered(cross, (0, 2, 1)), inverse)
        left = op.subtract(own, op.product(through, cross))
        apart = op.subtract(pulled, op.product(through, seen))
        gain = op.shaped(op.product(op.ordered(seen, (0, 2, 1)), op.product(inverse, seen)), (1,))
        known = op.subtract(gain, op.shaped(log_determinant, (1,)))
        for evidences, wide in ((of_wide, unit), (of_narrow, widths)):
            scaled = op.product(wide, apart)
            inverse, log_determinant = op.inverse(op.add(unit, op.product(op.product(wide, left), wide)), k)
            gain = op.shaped(op.product(op.ordered(scaled, (0, 2, 1)), op.product(inverse, scaled)), (1,))
            gain = op.add(known, op.subtract(gain, op.shaped(log_determinant, (1,))))
            evidences.append(op.add(constant, op.multiply(half, gain)))
    wide, tight = op.joined(of_wide, 1), op.joined(of_narrow, 1)
    highest = op.larger(op.largest(wide, 1), op.largest(tight, 1))
    wide, tight = (
        op.multiply(weight, op.shaped(op.total(op.exp(op.subtract(value, highest)), 1), (1,)))
        for weight, value in ((op.subtract(one, share), wide), (share, tight))
    )
    chance = op.divide(tight, op.add(wide, tight))
    return op.divide(
        one, op.add(op.subtract(one, chance), op.multiply(chance, op.precise(op.number("narrow_variance"))))
    )


def forward(op: SolvingArithmetic, sizes: Sizes, flux: Any, error: Any) -> dict[str, Any]:
    """The posterior of n stars.

    Parameters
    ----------
    op : SolvingArithmetic
        With the numbers of `PosteriorMixture.numbers`.
    sizes : Sizes
    flux, error : values of shape (n, p)
        A bad pixel has a flux that is not finite, or an error that is not positive, above 1e6 or NaN.

    Returns
    -------
    dict of str to value
        log_g, log_g_err : (n, 1)
            Posterior mean, corrected where a network has learnt to, within the range of the training labels, and its
            calibrated error, dex.
        label, label_sd, label_cov : (n, l)
            Posterior mean and standard deviation of each label, and its covariance with the first, log g. The scale
            over c₀ is the last.
        weights : (n, K)
            Probability of each expert's clouds.
        expert_label : (n, K)
            Mean of log g by the clouds of each expert alone.
        error_features : (n, 5)
            What the error model sees: log g, ln of its standard deviation, ln of that between clouds, the second and
            third label.
        chi2 : (n, 1)
            Energy outside the space of spectra and nuisances, per degree of freedom.
        distance : (n, 1)
            What the best point of the space gains over the best cloud, 2 Δ ln L per coordinate: about 1 for a star like
            those of the library.
        strength : (n, 1)
            c₀ over its standard error.
        scale : (n, 1)
            c₀.
        log_level : (n, 1)
            ½ ln of the mean of σ²/D over good pixels, of the spectrum divided by c₀.
        point : (n, n + q)
            b, the point near the star, nuisances behind the coordinates.
        n_good : (n, 1)
            Good pixels.
    """
    n, k, m, labels = sizes.n_coordinates, sizes.n_experts, sizes.n_clouds, sizes.n_labels
    number, constant = op.number, op.constant
    star = cloud_values(op, sizes, flux, error)
    inverse, coefficients = star.inverse, star.coefficients
    evidence, scale, level2 = star.evidence, star.scale, star.level2
    one, half, tiny = (op.precise(constant(value)) for value in (1.0, 0.5, TINY))

    def tall(value: Any) -> Any:
        return op.shaped(value, (1,))

    # -- labels ------------------------------------------------------------------------------------------------
    share = op.exp(op.subtract(evidence, op.largest(evidence, 1)))
    total = tall(op.total(share, 1))
    share = op.divide(share, total)  # (·, m)
    members = op.precise(number("members"))  # (m, K)
    gains = op.precise(number("gains"))  # (m, t, l)
    means = op.product(op.ordered(coefficients, (0, 1, 3, 2)), gains)  # (·, m, 1, l)
    means = op.add(op.shaped(means, (m, labels)), op.precise(number("labels")))
    weights = op.product(share, members)
    row = op.shaped(share, (1, m))
    label = op.shaped(op.product(row, means), (labels,))
    centred = op.subtract(means, op.shaped(label, (1, labels)))
    first = op.part(centred, 2, 0, 1)
    between = op.shaped(op.product(row, op.multiply(first, first)), (1,))
    solved = op.product(inverse, gains)  # (·, m, t, l)
    inner = op.add(op.total(op.multiply(gains, solved), 2), op.precise(number("scatter")))
    label_variance = op.shaped(op.product(row, op.add(inner, op.multiply(centred, centred))), (labels,))
    with_first = op.total(op.multiply(op.part(gains, 2, 0, 1), solved), 2)
    with_first = op.add(with_first, op.precise(number("scatter_with_first")))
    covariance = op.shaped(op.product(row, op.add(with_first, op.multiply(first, centred))), (labels,))
    # Within each expert: clouds far below the best of all still have an answer of their own.
    hidden = op.precise(number("others"))  # (K, m): 0 for the expert's clouds, −1e30 for all others
    each = op.add(op.shaped(evidence, (1, m)), hidden)
    each = op.exp(op.subtract(each, op.largest(each, 2)))
    first_means = op.shaped(op.part(means, 2, 0, 1), (m, 1))
    expert = op.shaped(op.divide(op.product(each, first_means), op.shaped(op.total(each, 2), (k, 1))), (k,))

    # -- what a user sees --------------------------------------------------------------------------------------
    freedom = op.add(one, op.relu(op.subtract(star.n_good, op.precise(constant(float(n + 1))))))
    chi2 = op.divide(op.subtract(star.energy, star.explained), freedom)
    log_level = op.multiply(half, op.log(op.add(level2, tiny)))
    spread = op.root(op.add(between, tiny))
    sd = op.root(op.add(op.relu(label_variance), tiny))
    point = op.shaped(star.point, (n + sizes.n_nuisances,))
    if sizes.corrects:
        found = {
            "point": point, "label": label, "label_sd": sd, "label_cov": covariance, "weights": weights,
            "expert_label": expert, "spread": spread, "log_level": log_level,
        }  # fmt: skip
        own = corrected(op, labels - 1, found)
        label = op.joined([own, op.part(label, 1, 1, labels)], 1)
    log_g = op.clip(op.part(label, 1, 0, 1), op.precise(number("lowest")), op.precise(number("highest")))
    floor = op.precise(constant(LEAST_SPREAD))
    seen = op.joined(
        [
            log_g,
            op.log(op.add(op.part(sd, 1, 0, 1), floor)),
            op.log(op.add(spread, floor)),
            op.part(label, 1, 1, 3),
        ],
        1,
    )
    hidden_units = op.tanh(
        op.add(op.product(seen, op.precise(number("error.w1"))), op.precise(number("error.b1")))
    )
    log_error = op.add(
        op.product(hidden_units, op.precise(number("error.w2"))), op.precise(number("error.b2"))
    )
    return {
        "log_g": log_g,
        "log_g_err": op.exp(log_error),
        "error_features": seen,
        "label": label,
        "label_sd": sd,
        "label_cov": covariance,
        "weights": weights,
        "expert_label": expert,
        "chi2": chi2,
        "distance": op.divide(star.distance, op.precise(constant(float(n)))),
        "strength": star.strength,
        "scale": scale,
        "log_level": log_level,
        "point": point,
        "n_good": star.n_good,
    }
