"""Small files in the layouts of the surveys, written with astropy: what reading gives is checked from outside.

Flux comes as f_λ (on any scale) on a grid in Å and is stored as the survey stores it: nJy against nm (PFS), or
1e-17 erg s⁻¹ cm⁻² Å⁻¹ (DESI).
"""

from __future__ import annotations

import numpy as np
from astropy.io import fits

BITS = {"BAD": 0, "SAT": 1, "CR": 3, "NO_DATA": 8, "FIBERTRACE": 10, "REFLINE": 15}
C = 2.99792458e18  # Å/s
LIGHT_SPEED = 299_792.458


def nanojansky(flux, wave):
    """f_λ in 1e-17 erg s⁻¹ cm⁻² Å⁻¹ as f_ν in nJy."""
    return flux * 1e-17 * wave**2 / C / 1e-32


def _bits(keyword="MP_{}"):
    return {keyword.format(name): bit for name, bit in BITS.items()}


def _columns(**columns):
    return fits.BinTableHDU.from_columns(
        [fits.Column(name, form, array=array, unit=unit) for name, (form, array, *unit) in columns.items()
         for unit in [unit[0] if unit else None]]
    )  # fmt: skip


def _named(hdu, name):
    hdu.name = name
    return hdu


def _objects(values):
    out = np.empty(len(values), object)
    out[:] = list(values)
    return out


def write_pfs_many(
    path, wave, flux, error, *, mask=None, visits=1, arms="bmn", obj_id=None, target_type=None, bits=True,
    table=True, order=None, overwrite=False,
):  # fmt: skip
    """A pfsCalibrated (one visit) or pfsCoadd; `wave`, `flux`, … are (p,) and (n, p), or lists of rows of any length.

    `order` shuffles the rows of FLUXTABLE. Without `table` there are images alone.
    """
    n = len(flux)
    waves = list(wave) if isinstance(wave, list) else [wave] * n
    nu = [nanojansky(f, w) for f, w in zip(flux, waves, strict=True)]
    nu_error = [nanojansky(e, w) for e, w in zip(error, waves, strict=True)]
    masks = [np.zeros(len(f), "i4") for f in flux] if mask is None else [np.asarray(m, "i4") for m in mask]
    ids = np.arange(n, dtype="i2")
    target = _columns(
        targetId=("I", ids), catId=("J", np.full(n, 10092)), tract=("J", np.ones(n, int)),
        patch=("PA()", _objects(["1,1"] * n)), objId=("K", 1000 + np.arange(n) if obj_id is None else obj_id),
        ra=("D", 229.6 + 0.01 * np.arange(n)), dec=("D", np.full(n, 67.2)),
        targetType=("I", np.ones(n, int) if target_type is None else target_type),
    )  # fmt: skip
    row_arms = [arms] * n if isinstance(arms, str) else arms
    observations = _columns(
        targetId=("I", np.repeat(ids, visits)), visit=("J", np.tile(123064 + np.arange(visits), n)),
        arm=("PA()", _objects([a for a in row_arms for _ in range(visits)])),
        fiberId=("J", np.repeat(np.arange(n) + 7, visits)),
    )  # fmt: skip
    text = "".join(f"MP_{name}: {bit}\n" for name, bit in BITS.items()) if bits else "nothing: 0\n"
    metadata = _columns(targetId=("I", ids), metadata=("PA()", _objects([text] * n)))
    hdus = [_named(target, "TARGET"), _named(observations, "OBSERVATIONS"), _named(metadata, "METADATA")]
    order = np.arange(n) if order is None else order
    if table:
        hdus.append(_named(_columns(
            targetId=("I", ids[order]),
            wavelength=("QD()", _objects([waves[i] / 10 for i in order])),
            flux=("QE()", _objects([nu[i].astype("f4") for i in order])),
            error=("QE()", _objects([nu_error[i].astype("f4") for i in order])),
            mask=("QJ()", _objects([masks[i] for i in order])),
        ), "FLUXTABLE"))  # fmt: skip
    else:
        variance = np.asarray(nu_error, "f4") ** 2
        hdus += [
            fits.ImageHDU(waves[0] / 10, name="WAVELENGTH"), fits.ImageHDU(np.asarray(nu, "f4"), name="FLUX"),
            fits.CompImageHDU(np.asarray(masks, "i4"), name="MASK"),
            _named(_columns(**{
                f"row_{k}": ("PE()", _objects(list(variance * share))) for k, share in enumerate((0.6, 0.15, 0.05))
            }), "COVAR"),
        ]  # fmt: skip
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path, overwrite=overwrite)
    return path


def write_pfs_one(
    path, wave, flux, error, *, mask=None, visits=3, arms="bmn", obj_id=1000, target_type=1, v_los=None, table=True,
    bits=True,
):  # fmt: skip
    """A pfsSingle (one visit), pfsObject, or pfsStar (with `v_los`)."""
    nu, nu_error = nanojansky(flux, wave).astype("f4"), nanojansky(error, wave).astype("f4")
    mask = np.zeros(len(flux), "i4") if mask is None else np.asarray(mask, "i4")
    target = _named(_columns(filterName=("5A", ["i_hsc"]), fiberFlux=("E", [1.0])), "TARGET")
    target.header.update({
        "CATID": 10092, "TRACT": 1, "PATCH": "1,1", "OBJID": int(obj_id), "RA": 229.6, "DEC": 67.2,
        "HIERARCH TARGETTYPE": target_type,
    })  # fmt: skip
    observations = _columns(
        visit=("J", 123064 + np.arange(visits)), arm=("3A", [arms] * visits), fiberId=("J", np.full(visits, 116)),
    )  # fmt: skip
    covar = np.stack([nu_error**2 * share for share in (0.6, 0.15, 0.05)]).astype("f4")
    masked = fits.ImageHDU(mask, name="MASK")
    hdus = [
        fits.ImageHDU(nu, name="FLUX"), masked, fits.ImageHDU(wave / 10, name="WAVELENGTH"), target,
        fits.ImageHDU(covar, name="COVAR"), _named(observations, "OBSERVATIONS"),
    ]  # fmt: skip
    if bits:
        for name, bit in _bits().items():
            masked.header[name if len(name) <= 8 else f"HIERARCH {name}"] = bit
    if table:
        rows = _named(_columns(
            wavelength=("D", wave / 10, "nm"), flux=("E", nu, "nJy"), error=("E", nu_error, "nJy"), mask=("K", mask),
        ), "FLUX_TABLE")  # fmt: skip
        hdus.append(rows)
    if v_los is not None:
        hdus.append(_named(_columns(
            param=("PA()", _objects(["T_eff", "v_los"])), value=("E", [5771.0, v_los]), valueErr=("E", [50.0, 2.0]),
        ), "STELLARPARAM"))  # fmt: skip
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    return path


def write_desi(
    path, arms, *, target_id=None, objtype=None, coadd=True, compressed=False, ivar=None, mask=None
):
    """A coadd or spectra file; `arms` maps R and Z to (wave, flux, error)."""
    n = len(next(iter(arms.values()))[1])
    status = "COADD_FIBERSTATUS" if coadd else "FIBERSTATUS"
    fibermap = _columns(
        TARGETID=("K", 39633345008634465 + np.arange(n) if target_id is None else target_id),
        TARGET_RA=("D", np.full(n, 105.5)), TARGET_DEC=("D", np.full(n, 56.7)), FIBER=("J", np.arange(n)),
        OBJTYPE=("3A", ["TGT"] * n if objtype is None else objtype), **{status: ("J", np.zeros(n, int))},
        DESI_TARGET=("K", np.zeros(n, "i8")),
    )  # fmt: skip
    hdus = [_named(fibermap, "FIBERMAP")]
    for arm, (wave, flux, error) in arms.items():
        inverse = 1 / error**2 if ivar is None else ivar[arm]
        bad = np.zeros(flux.shape, "u4") if mask is None else mask[arm].astype("u4")
        image = fits.ImageHDU(flux.astype("f4"), name=f"{arm}_FLUX")
        image.header["BUNIT"] = "10**-17 erg/(s cm2 Angstrom)"
        hdus += [
            fits.ImageHDU(wave, name=f"{arm}_WAVELENGTH"), image,
            fits.ImageHDU(inverse.astype("f4"), name=f"{arm}_IVAR"),
            (fits.CompImageHDU if compressed else fits.ImageHDU)(bad, name=f"{arm}_MASK"),
        ]  # fmt: skip
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    return path
