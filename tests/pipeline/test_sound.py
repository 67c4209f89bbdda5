"""Resampling as scipy does it, and sound files of any kind as samples of the latents' rate."""

import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from sound_files import write_sine

from happyhorse_fast.pipeline.sound import SAMPLE_RATE, read_sound, resample


def sums(sound, count):
    """Every frequency that both lengths have as a sum of sines; the highest of an even length stands for two."""
    there = len(sound)
    kept = min(there, count)
    time = np.arange(count) / count
    spectrum = np.fft.fft(sound) / there
    made = np.zeros(count, complex)
    for k in range(-(kept // 2), kept // 2 + 1):
        halved = 2 * abs(k) == kept == there
        made += (0.5 if halved else 1.0) * spectrum[k] * np.exp(2j * math.pi * k * time)
    return made.real


SIZES = [(64, 40), (64, 41), (65, 40), (65, 41), (40, 64), (41, 64), (40, 65), (40, 40), (41, 41), (5, 1)]


@pytest.mark.parametrize(("there", "count"), SIZES)
def test_resampling_is_that_of_the_formula(there, count):
    sound = np.random.default_rng(0).standard_normal((2, there))
    made = resample(torch.from_numpy(sound), count).numpy()
    assert np.abs(made - np.stack([sums(row, count) for row in sound])).max() < 1e-13


# fmt: off
RECORDED = {
    6: [
        -0.010927008819363815, 0.1678924876608208, 0.7340500719770713, 0.9677286956464732,
        -0.030411355891499715, -0.9161805844602882,
    ],
    7: [
        -0.010927008819363782, 0.1352922301081959, 0.5605211833031998, 0.9510427160278517,
        0.7487598506332771, -0.493343142718083, -0.8271681380696624,
    ],
    12: [
        0.0, 0.10463085822534327, 0.16242898325113891, 0.4299563635283555,
        0.7285865675673895, 0.9289873386477943, 0.9786557044658368, 0.6746741828473188,
        -0.03587486030118166, -0.7568024953079282, -0.92164408886997, -0.46929394182767026,
    ],
}
# fmt: on


def test_the_values_are_scipys():
    """scipy.signal.resample(np.sin(np.arange(8) ** 2 / 9), count), of scipy 1.17.1."""
    sound = torch.sin(torch.arange(8, dtype=torch.float64) ** 2 / 9)
    for count, recorded in RECORDED.items():
        assert (resample(sound, count) - torch.tensor(recorded, dtype=torch.float64)).abs().max() < 1e-13


def test_a_tone_stays_a_tone_at_the_rate_of_players():
    seconds, hertz = 5, 440.0
    count = 126 * 2048
    tone = torch.sin(2 * math.pi * hertz * torch.arange(count) / 51_200).expand(2, -1)
    made = resample(tone)
    assert made.dtype == torch.float32 and made.shape == (2, int(count * 441 / 512))
    wanted = torch.sin(2 * math.pi * hertz * torch.arange(made.shape[1]) / 44_100)
    middle = slice(44_100, 44_100 * (seconds - 1))
    assert (made[0, middle] - wanted[middle]).abs().max() < 2e-3
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        resample(torch.zeros(1))


def write(path, samples, rate, codec="pcm_s16le", layout="mono", of="flt"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), format=f"{of}p", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def tones(rate, seconds, channels):
    time = np.arange(int(rate * seconds)) / rate
    return np.stack([np.sin(2 * math.pi * 300 * time) * (0.2 + 0.4 * channel) for channel in range(channels)])


@pytest.mark.parametrize("rate", [16_000, 44_100, 51_200])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_a_sound_is_mono_at_the_latents_rate(tmp_path, rate, layout):
    channels = 1 if layout == "mono" else 2
    write(tmp_path / "a.wav", tones(rate, 1.5, channels), rate, layout=layout)
    sound = read_sound(tmp_path / "a.wav")
    assert sound.dtype == torch.float32 and abs(len(sound) - 1.5 * 51_200) < 2
    level = 0.2 if layout == "mono" else 0.4
    wanted = level * torch.sin(2 * math.pi * 300 * torch.arange(len(sound)) / 51_200)
    assert (sound - wanted)[1000:-1000].abs().max() < 2e-3
    cut = read_sound(tmp_path / "a.wav", 0.5)
    assert len(cut) == 25_600 and cut.equal(sound[:25_600])
    assert len(read_sound(tmp_path / "a.wav", 9)) == len(sound)


def test_sixteen_bits_are_kept_exactly(tmp_path):
    values = np.arange(-16384, 16384, 7, dtype=np.int16)
    write(tmp_path / "a.wav", values[None] / 32768, 51_200)
    assert (read_sound(tmp_path / "a.wav") * 32768).numpy().tolist() == values.tolist()


@pytest.mark.parametrize("second", [(44100, "mono"), (22050, "stereo")])
def test_a_stream_may_change_its_rate_and_channels(tmp_path, second):
    for rate, layout in ((44100, "stereo"), second):
        with av.open(str(tmp_path / "part"), "w", format="adts") as container:
            stream = container.add_stream("aac", rate=rate, layout=layout)
            tone = np.tile(np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate), (2 if layout == "stereo" else 1, 1))
            frame = av.AudioFrame.from_ndarray(0.5 * tone.astype(np.float32), format="fltp", layout=layout)
            frame.sample_rate = rate
            container.mux([*stream.encode(frame), *stream.encode()])
        with (tmp_path / "radio.aac").open("ab") as radio:
            radio.write((tmp_path / "part").read_bytes())
    found = read_sound(tmp_path / "radio.aac")
    assert len(found) == pytest.approx(4 * SAMPLE_RATE, abs=0.2 * SAMPLE_RATE)
    for half in (found[:SAMPLE_RATE], found[3 * SAMPLE_RATE : 4 * SAMPLE_RATE - 8192]):
        spectrum = torch.fft.rfft(half).abs()
        assert int(spectrum.argmax()) * SAMPLE_RATE / len(half) == pytest.approx(440, abs=2)
    assert read_sound(tmp_path / "radio.aac", 3).equal(found[: 3 * SAMPLE_RATE])


def test_tags_of_another_encoding_are_passed_over(tmp_path):
    plain = write_sine(tmp_path / "a.wav", 48_000).read_bytes()
    tag = "Caf\u00e9".encode("latin-1").ljust(6, b"\0")
    tags = b"INFOIART" + struct.pack("<I", len(tag)) + tag
    tagged = plain + b"LIST" + struct.pack("<I", len(tags)) + tags
    (tmp_path / "b.wav").write_bytes(tagged[:4] + struct.pack("<I", len(tagged) - 8) + tagged[8:])
    assert read_sound(tmp_path / "b.wav").equal(read_sound(tmp_path / "a.wav"))


def test_a_films_sound_is_read(tmp_path):
    from happyhorse_fast.pipeline.mp4 import Mp4Writer

    with Mp4Writer(tmp_path / "a.mp4", 32, 32) as film:
        film.add(torch.zeros(25, 32, 32, 3, dtype=torch.uint8))
        film.add_sound(torch.from_numpy(tones(44_100, 1, 2)))
    sound = read_sound(tmp_path / "a.mp4")
    assert abs(len(sound) - 51_200) < 51_200 * 0.05
    assert 0.35 < sound[10_000:40_000].abs().max() < 0.45


def no_sound(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height = stream.width = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path.write_text("no sound"), ValueError, "audio must be a sound file such as .*, .*a is not: "),
        (lambda path: path.write_bytes(b""), ValueError, "audio must be a sound file such as .*, .*a is not: "),
        (no_sound, ValueError, "audio must be a file with sound, .*a has none"),
        (lambda path: path.mkdir(), FileNotFoundError, "audio must be a file, .*a is none"),
        (lambda path: None, FileNotFoundError, "audio must be a file, .*a is none"),
    ],
)
def test_what_has_no_sound_is_one_sentence(tmp_path, make, error, message):
    make(tmp_path / "a")
    with pytest.raises(error, match=message) as raised:
        read_sound(tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_an_empty_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        container.add_stream("pcm_s16le", rate=8000, layout="mono")
        container.start_encoding()
    with pytest.raises(ValueError, match=r"audio must have sound, that of .*a\.wav is empty"):
        read_sound(tmp_path / "a.wav")
