"""Shards of a server that fails in the middle: taken up again where it stopped, or given up, and never mixed."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_samples import numbered, tar_bytes, told, unit_of
from stream_server import DATA, NO_LENGTH, WHOLE, Answer, Server, assert_a_beginning, assert_whole, read, unit_error

from geoloc_batch.records import UnitEnd
from geoloc_batch.stream.batch import Batch
from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.config import StreamConfig

OTHER = tar_bytes(numbered(40, first=1000))
GZIPPED = gzip.compress(DATA, mtime=0)
MODIFIED = "Wed, 01 Jul 2026 10:00:00 GMT"
LATER = "Wed, 01 Jul 2026 10:00:01 GMT"
CUT = 20_000
IN_A_HEADER, AT_A_BORDER = 512 * 7 + 100, 512 * 8


@pytest.mark.parametrize("cut_at", [1, IN_A_HEADER, AT_A_BORDER, CUT, len(DATA) - 1])
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_cut_body_is_taken_up_again_where_it_ended(server: Server, cut_at: int, is_reset: bool) -> None:
    reading = read(server, Answer(cut_at=cut_at, is_reset=is_reset), Answer())
    assert_whole(reading)
    asked_from = int(server.ranges[1].removeprefix("bytes=").removesuffix("-") or 0)
    # What a reset finds in the receiver's buffer is lost.
    assert asked_from <= cut_at if is_reset else asked_from == cut_at
    assert len(server.requests) == 2
    (warning,) = reading.reader.warnings
    assert f"asked again once, the last time after {asked_from} bytes" in warning


def test_a_body_that_stalls_is_taken_up_again(server: Server) -> None:
    reading = read(server, Answer(stall_at=CUT), Answer())
    assert_whole(reading)
    assert server.ranges == ["", f"bytes={CUT}-"]
    assert "timed out" in reading.reader.warnings[0]


def test_many_cuts_are_told_once_with_their_number(server: Server) -> None:
    reading = read(server, *(Answer(cut_at=at) for at in (100, 9000, 9000, 50_000)), Answer())
    assert_whole(reading)
    assert server.ranges == ["", "bytes=100-", "bytes=9000-", "bytes=9000-", "bytes=50000-"]
    (warning,) = reading.reader.warnings
    assert "asked again 4 times, the last time after 50000 bytes: it was cut" in warning


def test_a_busy_server_is_asked_again_in_the_middle_too(server: Server) -> None:
    answers = [Answer(status=503), Answer(cut_at=CUT), Answer(status=204), Answer(status=429)]
    assert_whole(read(server, *answers, Answer()))
    assert server.ranges == ["", "", *[f"bytes={CUT}-"] * 3]


def test_a_gzipped_tar_is_taken_up_again_at_its_packed_bytes(server: Server) -> None:
    cut_at = len(GZIPPED) // 2
    assert_whole(read(server, Answer(body=GZIPPED, cut_at=cut_at), Answer(body=GZIPPED)))
    assert server.ranges == ["", f"bytes={cut_at}-"]


def test_what_was_redirected_is_asked_for_at_its_first_address_again(server: Server) -> None:
    moved = Answer(status=302, headers={"Location": "/elsewhere.tar"})
    assert_whole(read(server, moved, Answer(cut_at=CUT), moved, Answer()))
    assert [request.path for request in server.requests] == ["/a.tar", "/elsewhere.tar"] * 2
    assert server.ranges[2:] == [f"bytes={CUT}-"] * 2


def test_a_body_of_untold_length_is_taken_up_again_by_its_etag(server: Server) -> None:
    assert_whole(read(server, Answer(is_chunked=True, cut_at=CUT), Answer(is_chunked=True)))
    assert server.requests[1][1:] == (f"bytes={CUT}-", '"v1"')
    # The answer for a part may tell how long the whole is: then its own end is no longer taken for the file's.
    assert_whole(read(server, Answer(is_chunked=True, cut_at=CUT), Answer(cut_at=2 * CUT), Answer()))


@pytest.mark.parametrize(
    ("etag", "modified", "if_range"),
    [('"v1"', "", '"v1"'), ('"v1"', MODIFIED, '"v1"'), ("", MODIFIED, MODIFIED), ('W/"v1"', MODIFIED, MODIFIED)],
)
def test_the_version_is_asked_for_by_a_strong_etag_or_else_by_the_time_of_change(
    server: Server, etag: str, modified: str, if_range: str
) -> None:
    assert_whole(read(server, Answer(cut_at=CUT, etag=etag, modified=modified), Answer(etag=etag, modified=modified)))
    assert server.requests[1].if_range == if_range


@pytest.mark.parametrize("first", [Answer(cut_at=CUT, etag=""), Answer(cut_at=CUT, etag='W/"v1"')])
def test_a_file_without_a_version_is_not_taken_up_again(server: Server, first: Answer) -> None:
    reading = read(server, first, Answer())
    assert_a_beginning(reading)
    assert 0 < len(reading.samples) < 40
    assert len(server.requests) == 1
    assert f"after {CUT} of {len(DATA)} bytes: it was cut" in unit_error(reading).message
    assert "does not tell the version" in unit_error(reading).message


@pytest.mark.parametrize(
    "second",
    [
        Answer(body=OTHER, etag='"v2"'),
        Answer(body=OTHER + bytes(512)),
        Answer(body=OTHER, etag='"v2"', has_ranges=False),
        Answer(body=OTHER, etag="", has_ranges=False),
        Answer(body=OTHER + bytes(512), has_ranges=False),
        Answer(body=OTHER, headers={"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}),
        Answer(body=OTHER, headers={"Content-Range": f"bytes {CUT + 512}-{len(DATA) - 1}/{len(DATA)}"}),
        Answer(body=OTHER, headers={"Content-Range": "nonsense"}),
        Answer(body=DATA[: CUT - 512]),
        Answer(status=404),
    ],
    ids=lambda answer: f"{answer.status}-{answer.etag}-{answer.has_ranges}-{len(answer.body)}-{answer.headers}",
)
def test_another_file_or_none_in_the_middle_ends_the_unit_and_mixes_nothing(server: Server, second: Answer) -> None:
    reading = read(server, Answer(cut_at=CUT), second, Answer())
    assert_a_beginning(reading)
    assert len(server.requests) == 2
    assert "cannot be taken up again" in unit_error(reading).message


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_time_of_change_that_is_another_ends_the_unit(server: Server, has_ranges: bool) -> None:
    second = Answer(body=OTHER, etag="", modified=LATER, has_ranges=has_ranges)
    assert_a_beginning(read(server, Answer(cut_at=CUT, etag="", modified=MODIFIED), second))
    assert len(server.requests) == 2


def test_without_ranges_the_bytes_of_the_same_etag_are_passed_over(server: Server) -> None:
    assert_whole(read(server, Answer(cut_at=CUT), Answer(has_ranges=False, cut_at=CUT // 2), Answer(has_ranges=False)))
    assert len(server.requests) == 3
    server.requests.clear()
    # The same time and length prove nothing where all the bytes come again.
    second = Answer(etag="", modified=MODIFIED, has_ranges=False)
    assert_a_beginning(read(server, Answer(cut_at=CUT, etag="", modified=MODIFIED), second))
    assert len(server.requests) == 2


def test_a_server_that_keeps_failing_is_given_up_after_five_tries_in_a_row(server: Server) -> None:
    reading = read(server, Answer(cut_at=CUT))
    assert_a_beginning(reading)
    assert server.ranges == ["", *[f"bytes={CUT}-"] * 4]
    assert "5 tries in a row failed" in unit_error(reading).message


def test_a_body_that_never_begins_is_asked_for_anew_even_in_another_version(server: Server) -> None:
    reading = read(server, Answer(body=DATA, cut_at=0), Answer(body=OTHER[: -512 * 9], etag='"v2"', cut_at=CUT))
    error = unit_error(reading)
    assert server.ranges == ["", "", *[f"bytes={CUT}-"] * 3]
    assert 0 < len(reading.samples) < 40
    assert error.bytes_unread == len(OTHER) - 512 * 9 - error.offset
    assert reading.samples[0].key == "01000"


def test_too_large_a_length_is_a_unit_error_and_no_end_without_a_word(server: Server) -> None:
    reading = read(server, Answer(says_bytes=len(DATA) + 1000))
    assert_a_beginning(reading, num_bytes=len(DATA) + 1000)
    assert len(reading.samples) == 40
    assert server.ranges == ["", f"bytes={len(DATA)}-"]
    assert "the server answered 416" in unit_error(reading).message


def test_too_small_a_length_is_a_shard_cut_there(server: Server) -> None:
    reading = read(server, Answer(says_bytes=CUT))
    error = unit_error(reading)
    assert told(reading.samples) == WHOLE[: len(reading.samples)]
    assert (error.bytes_unread, error.retryable) == (CUT - error.offset, False)
    assert len(server.requests) == 1


def test_a_body_without_length_that_ends_early_may_be_tried_again(server: Server) -> None:
    reading = read(server, Answer(says_bytes=NO_LENGTH, cut_at=CUT))
    assert_a_beginning(reading, num_bytes=None)
    assert len(server.requests) == 1
    assert_whole(read(server, Answer(says_bytes=NO_LENGTH)))


def test_chunks_that_are_none_are_taken_up_again(server: Server) -> None:
    head = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: "v1"\r\n\r\n'
    chunks = b"%x\r\n%s\r\nthese are no digits\r\n" % (CUT, DATA[:CUT])
    assert_whole(read(server, Answer(raw=head + chunks), Answer()))
    assert server.ranges == ["", f"bytes={CUT}-"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(DATA)), st.booleans(), st.booleans()), max_size=4),
    is_gzipped=st.booleans(),
)
def test_however_a_body_is_cut_its_photos_come_once_each(
    server: Server, cuts: list[tuple[int, bool, bool]], is_gzipped: bool
) -> None:
    server.requests.clear()
    body = GZIPPED if is_gzipped else DATA
    answers = [Answer(body=body, cut_at=at, is_reset=reset, has_ranges=ranges) for at, reset, ranges in cuts]
    assert_whole(read(server, *answers, Answer(body=body)))
    assert len(server.requests) <= 1 + len(cuts)


def test_a_shard_that_another_part_of_the_run_reads_says_its_tries_when_it_ends(server: Server) -> None:
    server.answers = [Answer(cut_at=CUT), Answer(cut_at=2 * CUT), Answer()]
    with BatchStream([unit_of(server.url())], side=20, batch_size=16, config=StreamConfig(decode_threads=1)) as stream:
        ends = []
        for item in stream:
            if isinstance(item, Batch):
                item.release()
            elif isinstance(item, UnitEnd):
                ends.append(item)
    (end,) = ends
    assert (end.num_samples, end.unit_error, len(end.warnings)) == (40, None, 1)
    assert "asked again 2 times" in end.warnings[0]
