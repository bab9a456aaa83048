import numpy as np
import pytest

from maskstore import Bitmap, InvalidMaskValue, Sparse, encode
from maskstore.errors import ColumnOrder, PadBits, TensorShape
from tests.maskstore.world import pruned

SHAPES = [(1, 1), (3, 7), (5, 63), (5, 64), (5, 65), (8, 128), (2, 1000), (17, 192)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_both_encodings_keep_the_set(shape, share):
    expected = pruned(shape, share, 1)
    target = encode(expected)
    for each in (target, target.to_bitmap(), target.to_sparse()):
        assert each.shape == shape
        assert each.pruned == expected.sum()
        assert np.array_equal(each.to_keep(), ~expected)
    assert target.nbytes == min(target.to_bitmap().nbytes, target.to_sparse().nbytes)


def test_layout_is_packbits_padded_to_eight_bytes():
    keep = ~pruned((3, 70), 0.4, 2)
    packed = Bitmap(encode(~keep).to_bitmap().keep, 70).keep
    assert packed.shape == (3, 16)
    assert np.array_equal(packed[:, :9], np.packbits(keep, axis=1, bitorder="little"))
    assert not packed[:, 9:].any()


def test_wide_modules_use_wide_columns():
    flags = np.zeros((2, 70_000), bool)
    flags[1, [5, 69_999]] = True
    target = encode(flags)
    assert isinstance(target, Sparse)
    assert target.cols.dtype == np.uint32
    assert target.cols.tolist() == [5, 69_999]
    assert encode(np.zeros((2, 65_536), bool)).tensors["cols"].dtype == np.uint16


def test_arrays_are_read_only():
    target = encode(pruned((4, 64), 0.5, 3))
    with pytest.raises(ValueError, match="read-only"):
        target.keep[0, 0] = 1


@pytest.mark.parametrize("bit", [70, 79, 80, 127])
def test_pad_bits_are_refused(bit):
    packed = np.zeros((3, 16), np.uint8)
    packed[2, bit // 8] = 1 << bit % 8
    with pytest.raises(PadBits, match=r"row 2 .* column 69"):
        Bitmap(packed, 70)


@pytest.mark.parametrize(
    ("rows", "cols", "error"),
    [
        ([0, 1, 2], [3, 1], None),
        ([0, 0, 0], [], None),
        ([0, 2, 2], [3, 1], "row 0 is not ascending, column 3 is followed by 1"),
        ([0, 0, 2], [1, 1], "row 1 is not ascending, column 1 is followed by 1"),
        ([0, 1, 2], [3, 10], "column 10 is out of range, the module has 10"),
        ([0, 1, 3], [3, 1], "offsets run 0..3, expected 0..2"),
        ([1, 1, 2], [3, 1], "offsets run 1..2, expected 0..2"),
        ([0, 2, 1, 2], [1, 3], "offset 2 is smaller"),
        ([0, -5, 2], [1, 3], "offset 1 is smaller"),
    ],
)
def test_columns_and_offsets_are_checked(rows, cols, error):
    arguments = np.array(rows, np.int32), np.array(cols, np.uint16), 10
    if error is None:
        assert Sparse(*arguments).pruned == len(cols)
        return
    with pytest.raises(ColumnOrder, match=error):
        Sparse(*arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bitmap(np.zeros((3, 8), np.int8), 64),
        lambda: Bitmap(np.zeros((3, 8), np.uint8), 65),
        lambda: Bitmap(np.zeros(8, np.uint8), 64),
        lambda: Sparse(np.zeros(3, np.int64), np.zeros(0, np.uint16), 9),
        lambda: Sparse(np.zeros(1, np.int32), np.zeros(0, np.uint16), 9),
        lambda: Sparse(np.zeros(3, np.int32), np.zeros(0, np.uint32), 9),
        lambda: encode(np.zeros((2, 2))),
        lambda: encode(np.zeros(4, bool)),
    ],
)
def test_dtypes_and_shapes_are_checked(make):
    with pytest.raises(TensorShape, match="expected"):
        make()


def test_impossible_sides_are_refused():
    with pytest.raises(InvalidMaskValue, match="outside"):
        Sparse(np.zeros(2, np.int32), np.zeros(0, np.uint32), 1 << 40)
    with pytest.raises(InvalidMaskValue, match="outside"):
        Bitmap(np.zeros((0, 8), np.uint8), 64)
