"""HDR and wide-gamut video as the sRGB pictures that image models know: light, gamut, tone, sRGB (ITU-R BT.2100)."""

from __future__ import annotations

import numpy as np

PQ, HLG = 16, 18
"""Transfer characteristics of ITU-T H.273: SMPTE ST 2084 and ARIB STD-B67."""
UNSPECIFIED, BT2020, P3 = 2, 9, 12
"""Colour primaries of ITU-T H.273; P3 is SMPTE EG 432, with white D65."""
TO_BT709 = {
    BT2020: np.array([[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1188]], np.float32),
    P3: np.array([[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0982]], np.float32),
}
"""Linear RGB to the primaries of BT.709 and sRGB (BT.2407)."""
WHITE = 203.0
"""Nits of a white page (BT.2408); what is brighter is a highlight."""
KNEE = 7 / 8
"""Of white: light above it is rolled off, so that highlights keep their shapes; white itself becomes 248."""
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2
"""Nits and system gamma of the display that BT.2100 calls nominal."""
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
FULL = 255 << 8
"""White in FFmpeg's 16 bits."""
ROWS = 64
"""Converted at a time: memory stays that of a strip."""


def is_foreign(transfer: int, primaries: int) -> bool:
    """Whether a frame so tagged would look washed out, were its values taken for sRGB."""
    return transfer in (PQ, HLG) or primaries in TO_BT709


def to_srgb(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """RGB signal uint16 (H, W, 3), white at FULL, as H.273 numbers tag it → sRGB uint8 (H, W, 3)."""
    if transfer in (PQ, HLG) and primaries == UNSPECIFIED:
        primaries = BT2020
    light = {PQ: pq_light, HLG: hlg_scene}.get(transfer, srgb_light)(np.linspace(0, 1, FULL + 1)).astype(np.float32)
    pictures = np.empty(signal.shape, np.uint8)
    for top in range(0, len(signal), ROWS):
        linear = light[np.minimum(signal[top : top + ROWS], FULL)]
        if transfer == HLG:
            linear *= (linear @ BT2020_LUMA)[..., None] ** (HLG_GAMMA - 1) * np.float32(HLG_PEAK / WHITE)
        if primaries in TO_BT709:
            linear = linear @ TO_BT709[primaries].T
        if transfer in (PQ, HLG):
            linear = _rolled_off(linear)
        pictures[top : top + ROWS] = np.rint(255 * srgb_signal(linear.clip(0, 1)))
    return pictures


def pq_light(signal: np.ndarray) -> np.ndarray:
    """Light, white is 1, of a signal 0…1: the EOTF of SMPTE ST 2084."""
    m1, m2 = 2610 / 16384, 2523 / 32
    c1, c2, c3 = 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10_000 / WHITE * ((power - c1).clip(0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """Light of the scene 0…1 of a signal 0…1: the inverse OETF of ARIB STD-B67, before the display's gamma."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def srgb_light(signal: np.ndarray) -> np.ndarray:
    """Light 0…1 of a signal 0…1 (IEC 61966-2-1)."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def srgb_signal(light: np.ndarray) -> np.ndarray:
    """The inverse of `srgb_light`."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _rolled_off(light: np.ndarray) -> np.ndarray:
    """Light as it is up to KNEE; above, it comes ever closer to 1 (Reinhard's curve, as steep at the knee)."""
    above = (light - KNEE).clip(0) / (1 - KNEE)
    return np.minimum(light, KNEE) + (1 - KNEE) * above / (1 + above)
