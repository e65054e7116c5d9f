"""Calibrate raw waveforms to charges and peak times, as ctapipe does by default, in compiled code.

ctapipe 0.28 calibrates a simtel telescope event in these steps, each with its own temporary arrays:
R0 to R1 (`apply_simtel_r1_calibration`: pedestal, gain, threshold gain selection),
`NeighborPeakWindowSum` (peak of the neighbours' summed waveform; window of 7 samples that begins 3
before the peak), integration correction, time shift, `NeighborAverage` for disabled pixels. Here
the same arithmetic, in the same order and floating-point precision, runs over the undecoded bytes
of the event, so that charges and times equal ctapipe's to the last bit; tests/test_calibrate.py
compares every pixel of every telescope event of the real files. The parameters are ctapipe's
defaults, kept here as constants.

The compiled functions keep Python's global lock: the decompressing thread works without it, and
releasing it for calls of microseconds costs more time than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from .instrument import Telescope
from .simtel import ADC_SAMPLES, Corrupt, Monitoring, RawObject

WINDOW_WIDTH = 7  # samples; ctapipe NeighborPeakWindowSum.window_width
WINDOW_SHIFT = 3  # samples; ctapipe NeighborPeakWindowSum.window_shift
GAIN_THRESHOLD = 4000.0  # ADC counts; ctapipe ThresholdGainSelector.threshold


@njit(cache=True)
def _decode(data: np.ndarray, out: np.ndarray) -> int:
    """Decode differential integers to (n_rows, n_samples) uint16; -1 if the bytes run out.

    The encoding of integers is "scount" of K. Bernloehr's eventio format; each row restarts at 0.
    """
    end = data.size
    pos = 0
    for row in range(out.shape[0]):
        value = np.int64(0)
        for sample in range(out.shape[1]):
            if pos >= end:
                return -1
            v0 = np.int64(data[pos])
            if v0 < 0x80:
                code = v0
                pos += 1
            elif v0 < 0xC0:
                if pos + 1 >= end:
                    return -1
                code = ((v0 & 0x3F) << 8) | np.int64(data[pos + 1])
                pos += 2
            elif v0 < 0xE0:
                if pos + 2 >= end:
                    return -1
                code = (
                    ((v0 & 0x1F) << 16) | (np.int64(data[pos + 1]) << 8) | np.int64(data[pos + 2])
                )
                pos += 3
            elif v0 < 0xF0:
                if pos + 3 >= end:
                    return -1
                code = (
                    ((v0 & 0x0F) << 24)
                    | (np.int64(data[pos + 1]) << 16)
                    | (np.int64(data[pos + 2]) << 8)
                    | np.int64(data[pos + 3])
                )
                pos += 4
            else:
                if pos + 4 >= end:
                    return -1
                code = (
                    ((v0 & 0x07) << 32)
                    | (np.int64(data[pos + 1]) << 24)
                    | (np.int64(data[pos + 2]) << 16)
                    | (np.int64(data[pos + 3]) << 8)
                    | np.int64(data[pos + 4])
                )
                pos += 5
            if code & 1:
                value -= (code >> 1) + 1
            else:
                value += code >> 1
            out[row, sample] = np.uint16(value & 0xFFFF)
    return pos


@njit(cache=True)
def _select_and_calibrate(
    adc: np.ndarray,
    pedestal: np.ndarray,
    factor: np.ndarray,
    threshold: float,
    gain: np.ndarray,
    waveforms: np.ndarray,
) -> None:
    """Select each pixel's gain channel and calibrate its waveform; float32, like ctapipe."""
    n_channels, n_pixels, n_samples = adc.shape
    for pixel in range(n_pixels):
        channel = 0
        if n_channels > 1:
            for sample in range(n_samples):
                if adc[0, pixel, sample] > threshold:
                    channel = 1
                    break
        gain[pixel] = channel
        ped, fac = pedestal[channel, pixel], factor[channel, pixel]
        for sample in range(n_samples):
            waveforms[pixel, sample] = (np.float32(adc[channel, pixel, sample]) - ped) * fac


@njit(cache=True)
def _extract(
    waveforms: np.ndarray,
    gain: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    broken: np.ndarray,
    width: int,
    shift: int,
    rate_ghz: float,
    correction: np.ndarray,
    time_shift: np.ndarray,
    has_shift: bool,
    charge: np.ndarray,
    peak_time: np.ndarray,
) -> None:
    """Apply ctapipe's NeighborPeakWindowSum to selected waveforms (n_pixels, n_samples)."""
    n_pixels, n_samples = waveforms.shape
    total = np.empty(n_samples, np.float64)
    for pixel in range(n_pixels):
        total[:] = 0.0
        for k in range(indptr[pixel], indptr[pixel + 1]):
            neighbor = indices[k]
            if broken[neighbor]:
                continue
            for sample in range(n_samples):
                total[sample] += waveforms[neighbor, sample]
        peak = 0
        for sample in range(1, n_samples):
            if total[sample] > total[peak]:
                peak = sample
        start, end = max(0, peak - shift), min(peak - shift + width, n_samples)
        summed, numerator, denominator = 0.0, 0.0, 0.0
        for sample in range(start, end):
            value = np.float64(waveforms[pixel, sample])
            summed += value
            if value > 0:
                numerator += value * sample
                denominator += value
        channel = gain[pixel]
        time = np.float32(numerator / denominator if denominator > 0 else peak)
        time = np.float32(np.float64(time) / rate_ghz)
        charge[pixel] = np.float32(np.float64(np.float32(summed)) * correction[channel])
        if has_shift:
            time -= time_shift[channel, pixel]
        peak_time[pixel] = time


@njit(cache=True)
def _repair(
    values: np.ndarray, broken_ids: np.ndarray, index: np.ndarray, neighbor: np.ndarray
) -> None:
    """Replace broken pixels by the mean of their good neighbours, 0 if none (NeighborAverage)."""
    total = np.zeros(broken_ids.size, np.float32)
    count = np.zeros(broken_ids.size, np.int64)
    for k in range(index.size):
        total[index[k]] += values[neighbor[k]]
        count[index[k]] += 1
    for i in range(broken_ids.size):
        if count[i] > 0:
            total[i] = np.float32(np.float64(total[i]) / np.float64(count[i]))
        values[broken_ids[i]] = total[i]


def integration_correction(
    reference_pulse: np.ndarray, reference_step_ns: float, sample_ns: float, width: int, shift: int
) -> np.ndarray:
    """Factor from the charge in the window to the charge of the whole pulse.

    Parameters
    ----------
    reference_pulse : (n_channels, n) array
        Pulse shape, sampled every `reference_step_ns`.
    sample_ns : float
        Length of a waveform sample.
    width, shift : int, samples
        Length of the window, and how far before the peak it begins.

    Returns
    -------
    (n_channels,) float64 array

    Notes
    -----
    Equals ctapipe.image.extractor.integration_correction, whose import takes 0.7 s; a test compares
    the two.
    """
    correction = np.ones(len(reference_pulse))
    for channel, pulse in enumerate(reference_pulse):
        length = pulse.size * reference_step_ns
        times = np.arange(0, length, reference_step_ns)
        edges = np.arange(0, length, sample_ns)
        density, _ = np.histogram(times, edges, weights=pulse, density=True)
        start = max(int(density.argmax()) - shift, 0)
        end = min(start + width, density.size)
        if start < end:
            correction[channel] = 1.0 / np.sum(density[start:end] * sample_ns)
    return correction


@dataclass
class _Workspace:
    """Arrays that are reused for all events with waveforms of one shape."""

    adc: np.ndarray
    waveforms: np.ndarray
    gain: np.ndarray


class Calibrator:
    """Calibration of one telescope."""

    def __init__(self, telescope: Telescope) -> None:
        camera = telescope.camera
        self.telescope = telescope
        self._neighbors = camera.geometry.neighbor_matrix_sparse
        self._correction = integration_correction(
            camera.reference_pulse,
            camera.reference_step_ns,
            1 / camera.sampling_rate_ghz,
            WINDOW_WIDTH,
            WINDOW_SHIFT,
        )
        self._broken = np.zeros(camera.n_pixels, bool)
        self._broken[telescope.disabled_pixels] = True
        self._broken_ids = np.flatnonzero(self._broken)
        if self._broken_ids.size:
            neighbors = camera.geometry.neighbor_matrix[self._broken] & ~self._broken
            self._pairs = np.nonzero(neighbors)  # (index in _broken_ids, good neighbour)
        self._work: dict[tuple[int, int, int], _Workspace] = {}
        self._constants: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self._version = -1

    def __call__(self, adc: RawObject, monitoring: Monitoring) -> tuple[np.ndarray, np.ndarray]:
        """Charge and peak time of every pixel.

        Parameters
        ----------
        adc : RawObject
            Undecoded ADC samples or ADC sums of the telescope.
        monitoring : Monitoring
            The telescope's pedestals and gains.

        Returns
        -------
        charge : (n_pixels,) float32, photo-electrons
        peak_time : (n_pixels,) float32, ns
            Zeros for cameras that store one sum per pixel.

        Raises
        ------
        Corrupt
            If the bytes are not waveforms of this camera.
        """
        pedestal, factor, time_shift = self._calibration(monitoring)
        if adc.type == ADC_SAMPLES:
            samples = self._samples(adc)
        else:
            samples = np.asarray(adc.parse())[:, :, np.newaxis]
        shapes = [a.shape for a in (pedestal, factor, time_shift) if a is not None]
        if {*shapes, samples.shape[:2]} != {(len(pedestal), self.telescope.camera.n_pixels)}:
            raise Corrupt(
                f"telescope {self.telescope.tel_id}: waveforms of shape {samples.shape} do not fit "
                f"pedestals and gains of shapes {shapes}"
            )
        if samples.shape[2] == 1:
            charge, peak_time = self._sums(samples, pedestal, factor)
        else:
            charge, peak_time = self._waveforms(samples, pedestal, factor, time_shift)
        if self._broken_ids.size:
            _repair(charge, self._broken_ids, *self._pairs)
            _repair(peak_time, self._broken_ids, *self._pairs)
        return charge, peak_time

    def _calibration(
        self, monitoring: Monitoring
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        values = monitoring.refresh()
        if self._constants is None or self._version != monitoring.version:
            if "pedestal" not in values or "calib" not in values:
                raise Corrupt(
                    f"telescope {self.telescope.tel_id}: no pedestals or gains before its data"
                )
            shift = values.get("tm_calib")
            pedestal = (values["pedestal"] / values["n_ped_slices"]).astype(np.float32)
            self._constants = (
                np.ascontiguousarray(pedestal),
                np.ascontiguousarray(values["calib"], np.float32),
                None if shift is None else np.ascontiguousarray(shift, np.float32),
            )
            self._version = monitoring.version
        return self._constants

    def _samples(self, adc: RawObject) -> np.ndarray:
        """Decode to (n_channels, n_pixels, n_samples) uint16, in a reused array."""
        if adc.id & 0x7FF:  # zero suppression, data reduction or a pixel list: eventio decodes it
            samples = np.asarray(adc.parse())
            return samples if samples.ndim == 3 else samples[..., np.newaxis]
        data = np.frombuffer(adc.payload, np.uint8)
        camera = self.telescope.camera
        if data.size < 8:
            raise Corrupt(f"telescope {self.telescope.tel_id}: no waveforms in its data")
        n_pixels = int(data[:4].view("<i4")[0])
        n_channels, n_samples = (int(v) for v in data[4:8].view("<i2"))
        if n_pixels != camera.n_pixels or not 0 < n_channels <= 2 or not 0 < n_samples < 4096:
            raise Corrupt(
                f"telescope {self.telescope.tel_id}: {n_channels} x {n_pixels} x {n_samples} "
                f"samples do not fit its camera of {camera.n_pixels} pixels"
            )
        work = self._workspace(n_channels, n_pixels, n_samples)
        if _decode(data[8:], work.adc.reshape(-1, n_samples)) < 0:
            raise Corrupt(f"telescope {self.telescope.tel_id}: its waveforms are cut off")
        return work.adc

    def _workspace(self, n_channels: int, n_pixels: int, n_samples: int) -> _Workspace:
        key = (n_channels, n_pixels, n_samples)
        if key not in self._work:
            self._work[key] = _Workspace(
                np.empty(key, np.uint16),
                np.empty((n_pixels, n_samples), np.float32),
                np.empty(n_pixels, np.int8),
            )
        return self._work[key]

    def _sums(
        self, samples: np.ndarray, pedestal: np.ndarray, factor: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        n_channels, n_pixels, _ = samples.shape
        gain = np.zeros(n_pixels, np.int8)
        if n_channels > 1:
            gain = (samples[0] > GAIN_THRESHOLD).any(axis=1).astype(np.int8)
        calibrated = (samples[:, :, 0] - pedestal) * factor
        charge = calibrated[gain, np.arange(n_pixels)].astype(np.float32)
        return charge, np.zeros(n_pixels, np.float32)

    def _waveforms(
        self,
        samples: np.ndarray,
        pedestal: np.ndarray,
        factor: np.ndarray,
        time_shift: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        work = self._workspace(*samples.shape)
        _select_and_calibrate(
            np.ascontiguousarray(samples, np.uint16),
            pedestal,
            factor,
            GAIN_THRESHOLD,
            work.gain,
            work.waveforms,
        )
        n_pixels = samples.shape[1]
        charge, peak_time = np.empty(n_pixels, np.float32), np.empty(n_pixels, np.float32)
        _extract(
            work.waveforms,
            work.gain,
            self._neighbors.indptr,
            self._neighbors.indices,
            self._broken,
            WINDOW_WIDTH,
            WINDOW_SHIFT,
            self.telescope.camera.sampling_rate_ghz,
            self._correction,
            pedestal if time_shift is None else time_shift,
            time_shift is not None,
            charge,
            peak_time,
        )
        return charge, peak_time
