"""What pictures look like, in figures: likeness, blocks, sharpness, brightness, colour."""

import math

import cv2
import numpy as np

LOOKS = ("sharpness", "brightness", "colourfulness")  # of `looks`


def psnr(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """PSNR in dB (...) of frames (... h w 3) uint8 against the real ones; 99 dB where they are the same."""
    return decibels(squared_error(made, real))


def squared_error(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean squared difference (...) of frames (... h w 3) uint8, each in [0, 255], from the real ones."""
    return np.square(made.astype(np.float32) - real.astype(np.float32)).mean(axis=(-3, -2, -1))


def decibels(error: np.ndarray) -> np.ndarray:
    """PSNR (...) of squared errors (...) of uint8 pictures, at most 99 dB."""
    return np.minimum(20 * math.log10(255) - 10 * np.log10(np.maximum(error, 1e-12)), 99.0)


def correlation(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Correlation (b) of the pixels of frames (b h w 3) with the real ones': 1 if alike up to brightness and contrast,
    0 where one has no contrast."""
    first, second = (frames.reshape(len(frames), -1).astype(np.float32) for frames in (made, real))
    first, second = (x - x.mean(axis=1, keepdims=True) for x in (first, second))
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return (first * second).sum(axis=1) / np.maximum(size, 1e-6)


def grid_ratio(frames: np.ndarray, unit: tuple[int, int]) -> float:
    """Mean absolute step across the lines of a grid of `unit` (rows, columns) px, over the mean step elsewhere, of
    frames (b h w 3) uint8: 1 in a picture that knows nothing of the grid."""
    across, elsewhere = [], []
    for axis, px in zip((1, 2), unit, strict=True):
        steps = np.abs(np.diff(frames.astype(np.int16), axis=axis))
        line = np.arange(1, frames.shape[axis]) % px == 0
        across.append(steps.compress(line, axis=axis).ravel())
        elsewhere.append(steps.compress(~line, axis=axis).ravel())
    beside = np.concatenate(elsewhere)
    return float(np.concatenate(across).mean() / max(beside.mean(), 1e-6)) if beside.size else 1.0


def looks(frames: np.ndarray) -> np.ndarray:
    """Per frame (n h w 3) uint8 its LOOKS (n 3): the mean gradient of its grey values, their mean, both of 255, and
    how colourful it is (Hasler and Suesstrunk 2003, eq. 6)."""
    return np.array([_looks(frame) for frame in frames])


def _looks(frame: np.ndarray) -> tuple[float, float, float]:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    gradient = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    red, green, blue = np.moveaxis(frame.astype(np.float32), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = math.hypot(red_green.std(), yellow_blue.std())
    colour = spread + 0.3 * math.hypot(red_green.mean(), yellow_blue.mean())
    return float(gradient.mean()), float(grey.mean()), colour
