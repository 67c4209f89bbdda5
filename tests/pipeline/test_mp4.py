"""Films: streams, counts and colours as they were put in; whole, or not there at all."""

import resource
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from happyhorse_fast.pipeline import TurboDecoder, host_frames, mp4, to_uint8
from happyhorse_fast.pipeline.mp4 import Mp4Writer

HEIGHT, WIDTH = 32, 64


def colours(count):
    frames = torch.empty(count, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    frames[:, :, : WIDTH // 2] = torch.tensor([220, 40, 10], dtype=torch.uint8)
    frames[:, :, WIDTH // 2 :] = torch.tensor([10, 200, 30], dtype=torch.uint8)
    return frames


WANTED = colours(1)[0].numpy()
BT601 = 5


def tone(samples):
    return torch.sin(torch.arange(samples) / 20).expand(2, -1)


def write(path, *, sound_first=False, **options):
    with Mp4Writer(path, WIDTH, HEIGHT, **options) as film:
        if sound_first:
            film.add_sound(tone(220_500))
        for count in (25, 28, 28, 28, 16):
            film.add(colours(count))
        if not sound_first:
            film.add_sound(tone(100_000))
            film.add_sound(tone(120_500))
    return path


def packets(path):
    with av.open(str(path)) as container:
        return "".join(packet.stream.type[0] for packet in container.demux() if packet.size)


@pytest.mark.parametrize("sound_first", [False, True])
def test_a_film_has_the_frames_and_the_sound_it_was_given(tmp_path, sound_first):
    path = write(tmp_path / "a.mp4", sound_first=sound_first)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.pix_fmt, video.average_rate) == ("h264", "yuv420p", 25)
        assert (audio.codec_context.name, audio.sample_rate, audio.layout.name) == ("aac", 44_100, "stereo")
        assert video.frames == 125 and video.duration * video.time_base == 5
        assert audio.duration * audio.time_base == 5 and audio.start_time == 0
        pictures = list(container.decode(video=0))
    assert len(pictures) == 125
    # Every second of video lies beside its sound, whichever came first.
    half = packets(path)[: len(packets(path)) // 2]
    assert min(half.count("v"), half.count("a")) > 50
    assert path.read_bytes()[4 + 28 :].index(b"moov") < 100, "the index is not in front"


def test_colours_are_those_of_the_frames_by_the_matrix_that_players_take(tmp_path):
    path = write(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0))
    assert picture.colorspace == picture.color_primaries == picture.color_trc == mp4.BT709
    error = {
        matrix: np.abs(picture.reformat(format="rgb24", src_colorspace=matrix).to_ndarray().astype(int) - WANTED).max()
        for matrix in (mp4.BT709, BT601)
    }
    assert error[mp4.BT709] <= 3 and error[BT601] > 10


def test_the_same_film_is_the_same_bytes_however_many_threads_encode_it(tmp_path, monkeypatch):
    noisy = torch.randint(0, 256, (40, 96, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    films = set()
    for threads in ("1", "3", "8"):
        monkeypatch.setattr(mp4, "SAME_BYTES", mp4.SAME_BYTES | {"threads": threads})
        with Mp4Writer(tmp_path / "a.mp4", 160, 96) as film:
            film.add(noisy)
            film.add_sound(tone(70_000))
        films.add((tmp_path / "a.mp4").read_bytes())
    assert len(films) == 1
    assert b"mbtree=0" in films.pop(), "whose results are not the same every time, in no predictable run"


def test_loud_sound_is_cut_not_wrapped(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4", WIDTH, HEIGHT, channels=1, sample_rate=12_000, fps=24) as film:
        film.add(colours(24))
        film.add_sound(10 * tone(12_000)[:1])
    with av.open(str(tmp_path / "a.mp4")) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert 0.9 < np.abs(heard).max() < 1.6


@pytest.fixture
def full_disk():
    """Files may not grow beyond 4 KiB: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("sound_first", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, sound_first):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"an older film")
    with pytest.raises(OSError, match=r"a\.mp4 cannot be written: File too large$"):
        write(path, sound_first=sound_first, crf=0)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"an older film"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("of the caller's own"), ZeroDivisionError()])
def test_an_error_between_frames_is_kept_and_leaves_nothing(tmp_path, error):
    film = Mp4Writer(tmp_path / "a.mp4", WIDTH, HEIGHT)

    def stops():
        with film:
            film.add(colours(10))
            raise error

    with pytest.raises(type(error)) as raised:
        stops()
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda film: None, "a film needs frames and sound, got 0 and 0 samples"),
        (lambda film: film.add(colours(1)), "a film needs frames and sound, got 1 and 0 samples"),
        (lambda film: film.add(colours(1)[:, :16]), r"frames must be \[n, 32, 64, 3\], got \[1, 16, 64, 3\]"),
        (lambda film: film.add_sound(torch.zeros(1, 5)), r"samples must be \[2, m\], got \[1, 5\]"),
    ],
)
def test_half_a_film_is_none(tmp_path, use, message):
    with pytest.raises(ValueError, match=message), Mp4Writer(tmp_path / "a.mp4", WIDTH, HEIGHT) as film:
        use(film)
    assert list(tmp_path.iterdir()) == []


def test_frames_must_be_bytes(tmp_path):
    film = Mp4Writer(tmp_path / "a.mp4", WIDTH, HEIGHT)
    with pytest.raises(TypeError, match=r"must be a tensor or an array of uint8, got float32"), film:
        film.add(colours(1).float())


def test_where_nothing_can_be_written_is_said_on_entering(tmp_path):
    film = Mp4Writer(tmp_path / "none" / "a.mp4", WIDTH, HEIGHT)
    with pytest.raises(OSError, match=r"a\.mp4 cannot be written: No such file or directory"), film:
        pytest.fail("entered")
    with pytest.raises(ValueError, match=r"height and width must be even, .* got 32 x 63"):
        Mp4Writer(tmp_path / "a.mp4", 63, HEIGHT)


def test_a_build_without_the_encoder_is_said_on_entering(tmp_path, monkeypatch):
    monkeypatch.setattr(mp4, "VIDEO_CODEC", "h264_of_nobody")
    film = Mp4Writer(tmp_path / "a.mp4", WIDTH, HEIGHT)
    with pytest.raises(OSError, match=r"a\.mp4 cannot be written: .*h264_of_nobody"), film:
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


class Decoder:
    """Latents whose windows are known, and when each was asked for."""

    def __init__(self):
        self.asked = []

    def windows(self, latents, tiles=1):
        assert tiles == 2
        for index, window in enumerate(latents):
            self.asked.append(index)
            yield window[None]


def test_a_window_leaves_when_the_next_was_begun():
    windows = torch.rand(3, 3, 4, 8, 6) * 3 - 1.5
    decoder = Decoder()
    stream = host_frames.host_frames(decoder, windows, 2)
    first = next(stream)
    assert decoder.asked == [0, 1]
    assert first.equal(to_uint8(windows[0]).permute(1, 2, 3, 0)) and first.is_contiguous()
    assert torch.cat([first, *stream]).equal(to_uint8(windows).permute(0, 2, 3, 4, 1).flatten(0, 1))


def test_a_decoders_clip_goes_into_a_film(tmp_path):
    like = TurboDecoder([8, 8, 6, 4, 2], [1, 1, 1, 1, 1]).state_dict()
    decoder = TurboDecoder.from_tensors({key: torch.randn(tensor.shape) for key, tensor in like.items()})
    with Mp4Writer(tmp_path / "a.mp4", WIDTH, HEIGHT) as film:
        for frames in host_frames.host_frames(decoder, torch.randn(1, 48, 9, 2, 4)):
            film.add(frames)
        film.add_sound(tone(33 * 1764))
    assert packets(Path(tmp_path / "a.mp4")).count("v") == 33
    with pytest.raises(ValueError, match="latents must be of size 48"):
        host_frames.host_frames(decoder, torch.zeros(1, 3, 1, 2, 2))


@pytest.mark.parametrize("name", ["x.mp4", "X.MP4", "clip", "clip-0.5", "/dev/stdout"])
def test_a_name_of_another_format_is_refused(name):
    mp4.require_mp4(Path(name))
    with pytest.raises(ValueError, match=r"out must end with \.mp4"):
        mp4.require_mp4(Path(f"{name}.gif"))
