"""Pictures: what a viewer shows arrives, whatever file it is in, or one line says why it cannot."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from lab.errors import UserError
from lab.pictures import PREPARATION, find_files, find_pictures, read_picture

#### Files #########################################################################################

WIDTH, HEIGHT = 40, 30


def chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', checksum)


def png(bits, samples, colour_type, transparent=None, size=(WIDTH, HEIGHT)):
    """A PNG of one colour, which Pillow cannot write. 4 bits: an even width and one sample."""
    width, height = size
    if bits == 4:
        row = bytes([samples[0] * 17]) * (width // 2)
    else:
        row = struct.pack(f'>{len(samples)}{"H" if bits == 16 else "B"}', *samples) * width
    header = struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, 0)
    content = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
    if transparent:
        content += chunk(b'tRNS', struct.pack(f'>{len(transparent)}H', *transparent))
    return content + chunk(b'IDAT', zlib.compress((b'\0' + row) * height)) + chunk(b'IEND', b'')


def tiff(pixels, bits, samples=1, photometric=1, planar=1):
    """An uncompressed TIFF with one strip, or with one for each plane."""
    tags = {
        256: (4, WIDTH),
        257: (4, HEIGHT),
        258: (3, bits),
        259: (3, 1),
        262: (3, photometric),
        273: (4, 8),
        277: (3, samples),
        278: (4, HEIGHT),
        279: (4, len(pixels)),
        284: (3, planar),
    }
    entries = b''.join(struct.pack('<HHII', tag, kind, 1, v) for tag, (kind, v) in tags.items())
    start = struct.pack('<2sHI', b'II', 42, 8 + len(pixels))
    return start + pixels + struct.pack('<H', len(tags)) + entries + bytes(4)


def save(image, kind, **options):
    """What Pillow writes, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode, colour, kind, **options):
    return save(Image.new(mode, (WIDTH, HEIGHT), colour), kind, **options)


def grey_16(dtype, kind):
    return save(Image.fromarray(np.full((HEIGHT, WIDTH), 100 * 257, dtype)), kind)


def palette(kind, **options):
    image = Image.new('P', (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    return save(image, kind, **options)


def animation(kind):
    frames = [Image.new('RGB', (WIDTH, HEIGHT), colour) for colour in (ORANGE, 'blue', 'green')]
    return save(frames[0], kind, save_all=True, append_images=frames[1:])


def swapped_profile():
    """sRGB's profile, with the light of red and blue exchanged."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    names = {b'rXYZ': b'bXYZ', b'bXYZ': b'rXYZ'}
    count = struct.unpack('>I', content[128:132])[0]
    table = content[132 : 132 + 12 * count]
    entries = [table[i : i + 12] for i in range(0, len(table), 12)]
    swapped = b''.join(names.get(entry[:4], entry[:4]) + entry[4:] for entry in entries)
    return content[:132] + swapped + content[132 + 12 * count :]


def read(content, tmp_path, name='picture'):
    """The only colour of a picture."""
    (tmp_path / name).write_bytes(content)
    picture = read_picture(tmp_path / name)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert (picture == picture[0, 0]).all()
    return tuple(picture[0, 0].tolist())


#### What viewers show #############################################################################

ORANGE = (200, 100, 50)
HALF_ORANGE = (227, 177, 152)  # at 128 of 255 over white
GREY = (100, 100, 100)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
G16 = 100 * 257
O16 = [257 * value for value in ORANGE]
GREY_12 = bytes([0x64, 0x66, 0x46]) * (WIDTH * HEIGHT // 2)  # twice 0x646, which is 100 / 255

CASES = {
    'grey of 16 bits, PNG': (grey_16(np.uint16, 'PNG'), GREY),
    'grey of 16 bits, TIFF': (grey_16(np.uint16, 'TIFF'), GREY),
    'grey of 16 bits, big-endian TIFF': (grey_16('>u2', 'TIFF'), GREY),
    'grey of 16 bits, PGM': (b'P5 40 30 65535\n' + b'\x64\x64' * 1200, GREY),
    'grey of 10 bits, PGM': (b'P5 40 30 1023\n' + b'\x01\x91' * 1200, GREY),
    'grey of 16 bits, JPEG 2000': (grey_16(np.uint16, 'JPEG2000'), GREY),
    'grey of 16 bits, rounded': (png(16, [G16 + 128], 0), GREY),
    'grey of 16 bits, rounded up': (png(16, [G16 + 129], 0), (101, 101, 101)),
    'grey of 16 bits, white is 0': (tiff(b'\x64\x64' * 1200, 16, photometric=0), (155, 155, 155)),
    'grey of 12 bits, TIFF': (tiff(GREY_12, 12), GREY),
    'grey of 16 bits, transparent': (png(16, [G16], 0, transparent=[G16]), WHITE),
    'grey of 16 bits, another one transparent': (png(16, [G16], 0, [G16 + 1]), GREY),
    'grey of 16 bits with alpha': (png(16, [G16, 128 * 257], 4), (177, 177, 177)),
    'RGB of 16 bits': (png(16, O16, 2), ORANGE),
    'RGB of 16 bits, transparent': (png(16, O16, 2, transparent=O16), WHITE),
    'RGBA of 16 bits': (png(16, [*O16, 128 * 257], 6), HALF_ORANGE),
    'grey of 4 bits': (png(4, [5], 0), (85, 85, 85)),
    'grey of 4 bits, transparent': (png(4, [5], 0, transparent=[5]), WHITE),
    'grey of 4 bits, another one transparent': (png(4, [5], 0, transparent=[85]), (85, 85, 85)),
    'grey of 8 bits, transparent': (png(8, [100], 0, transparent=[100]), WHITE),
    'RGB of 8 bits, transparent': (png(8, ORANGE, 2, transparent=ORANGE), WHITE),
    'black and white': (plain('1', 1, 'PNG'), WHITE),
    'black and white, TIFF': (plain('1', 0, 'TIFF'), BLACK),
    'grey': (plain('L', 100, 'PNG'), GREY),
    'grey with alpha': (plain('LA', (100, 128), 'PNG'), (177, 177, 177)),
    'RGB': (plain('RGB', ORANGE, 'PNG'), ORANGE),
    'RGBA': (plain('RGBA', (*ORANGE, 128), 'PNG'), HALF_ORANGE),
    'RGBA, all transparent': (plain('RGBA', (*ORANGE, 0), 'PNG'), WHITE),
    'RGBA, TIFF': (plain('RGBA', (*ORANGE, 128), 'TIFF'), HALF_ORANGE),
    'RGBA, WebP': (plain('RGBA', (*ORANGE, 128), 'WEBP', lossless=True), HALF_ORANGE),
    'palette': (palette('PNG'), ORANGE),
    'palette, BMP': (palette('BMP'), ORANGE),
    'palette, one colour transparent': (palette('PNG', transparency=1), WHITE),
    'palette, half transparent': (palette('PNG', transparency=b'\xff\x80'), HALF_ORANGE),
    'GIF': (palette('GIF'), ORANGE),
    'GIF, transparent': (palette('GIF', transparency=1), WHITE),
    'animated GIF': (animation('GIF'), ORANGE),
    'animated PNG': (animation('PNG'), ORANGE),
    'CMYK, JPEG': (plain('CMYK', (0, 128, 192, 32), 'JPEG', quality=95), (223, 111, 55)),
    'CMYK, TIFF': (plain('CMYK', (0, 128, 192, 32), 'TIFF'), (223, 111, 55)),
    'YCbCr, TIFF': (plain('RGB', ORANGE, 'TIFF', compression='jpeg'), ORANGE),
    'LAB, TIFF': (plain('LAB', (138, 209, 198), 'TIFF'), (255, 0, 0)),
    'JPEG': (plain('RGB', ORANGE, 'JPEG', quality=95), ORANGE),
    'large JPEG': (save(Image.new('RGB', (3000, 2000), ORANGE), 'JPEG'), ORANGE),
    'grey JPEG': (plain('L', 100, 'JPEG'), GREY),
    'another profile': (plain('RGB', ORANGE, 'PNG', icc_profile=swapped_profile()), ORANGE[::-1]),
    'a profile for other colours': (plain('L', 100, 'PNG', icc_profile=swapped_profile()), GREY),
    'a damaged profile': (plain('RGB', ORANGE, 'PNG', icc_profile=b'damaged'), ORANGE),
}
TOLERANCES = {'CMYK, JPEG': 2, 'JPEG': 2, 'YCbCr, TIFF': 2, 'large JPEG': 2, 'LAB, TIFF': 6}
TOLERANCES['another profile'] = 1


@pytest.mark.parametrize('case', CASES)
def test_what_a_viewer_shows_arrives(case, tmp_path):
    content, expected = CASES[case]
    distance = np.abs(np.subtract(read(content, tmp_path), expected)).max()
    assert distance <= TOLERANCES.get(case, 0)


def test_a_16_bit_ramp_keeps_its_shape(tmp_path):
    """Clipped to 8 bits, it would be white but for the first column."""
    ramp = np.tile(np.arange(32) * 2048, (32, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    expected = (ramp / 257).round()
    assert np.array_equal(read_picture(tmp_path / 'ramp.png'), np.stack([expected] * 3, 2))


TURNED = {  # by EXIF's orientation: whether the file holds a picture mirrored, and quarter turns
    1: (False, 0),
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 1),
    7: (True, 3),
    8: (False, 3),
}


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', TURNED)
def test_pictures_stand_upright(orientation, kind, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    mirrored, turns = TURNED[orientation]
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, turns)
    exif = Image.Exif()
    exif[274] = orientation
    options = {'lossless': True} if kind == 'WEBP' else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.save(tmp_path / 'picture', kind, exif=exif, **options)
    assert np.array_equal(read_picture(tmp_path / 'picture'), upright)


def test_other_damage_in_exif_does_not_matter(tmp_path):
    """Pillow can turn such a picture, but cannot write its EXIF data again."""
    upright = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 3
    exif[271] = 'maker'
    exif[305] = 80 * 'x'
    image = Image.fromarray(np.ascontiguousarray(upright[::-1, ::-1]))
    content = save(image, 'WEBP', exif=exif, lossless=True)
    text, rationals = b'\x01\x0f\x00\x02', b'\x01\x0f\x00\x05'
    assert text in content
    (tmp_path / 'picture').write_bytes(content.replace(text, rationals))
    assert np.array_equal(read_picture(tmp_path / 'picture'), upright)


def test_nothing_of_a_picture_is_cut_off(tmp_path):
    """The outermost columns of a wide picture arrive."""
    pixels = np.zeros((32, 320, 3), np.uint8)
    pixels[:, :10] = 250
    pixels[:, -10:] = 120
    Image.fromarray(pixels).save(tmp_path / 'wide.png')
    picture = read_picture(tmp_path / 'wide.png')
    assert picture[:, 0].min() > 200 and 80 < picture[16, -1].max() < 140
    assert picture[:, 8:24].max() == 0


def test_fine_stripes_become_grey(tmp_path):
    """Without antialiasing they would become black, white, or wide stripes."""
    pixels = np.zeros((320, 320, 3), np.uint8)
    pixels[:, ::2] = 255
    for kind in ('PNG', 'JPEG'):
        Image.fromarray(pixels).save(tmp_path / 'stripes', kind)
        assert np.abs(read_picture(tmp_path / 'stripes') - 127.5).max() < 8


def test_transparent_pixels_keep_their_hidden_colour_to_themselves(tmp_path):
    """Red below every second, transparent column: it must not bleed into the black ones."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, ::2] = (255, 0, 0, 0)
    Image.fromarray(pixels).save(tmp_path / 'stripes.png')
    picture = read_picture(tmp_path / 'stripes.png').astype(int)
    assert np.abs(picture - 127.5).max() < 25 and (picture == picture[..., :1]).all()


def test_a_large_jpeg_is_nearly_the_same_as_its_pixels(tmp_path):
    """It is decoded at a fraction of its size, because phones make thousands of them."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    image = small.resize((1200, 900), Image.Resampling.BICUBIC)
    (tmp_path / 'a.jpg').write_bytes(save(image, 'JPEG', quality=95))
    Image.open(tmp_path / 'a.jpg').save(tmp_path / 'a.png')
    jpeg, pixels = [read_picture(tmp_path / name).astype(int) for name in ('a.jpg', 'a.png')]
    assert np.abs(jpeg - pixels).max() <= 2


def test_the_preparation_is_what_sets_and_networks_remember():
    """Change this line whenever pictures come out otherwise than before."""
    what = 'upright, transparency on white, sRGB, squeezed to 32 x 32 with bicubic antialiasing'
    assert PREPARATION == what


#### What cannot be read ###########################################################################


def refuse(content, path):
    """The one line that refuses a picture, without its name."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_picture(path)
    line = str(error.value)
    start = f'{path}: cannot be read as a picture: '
    assert line.startswith(start) and '\n' not in line
    return line.removeprefix(start)


FLOATS = save(Image.new('F', (WIDTH, HEIGHT), 0.5), 'TIFF')
INTEGERS = save(Image.new('I', (WIDTH, HEIGHT), 100 * 257), 'TIFF')
PLANES = tiff(bytes(6 * WIDTH * HEIGHT), 16, samples=3, photometric=2, planar=2)
HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(100)
UNKNOWN = 'it is damaged, or of a kind that Pillow does not know; save it as JPEG or PNG'
REFUSED = {
    'floats': (FLOATS, 'its pixels are no whole numbers; save it with 8 or 16 bits'),
    'integers': (INTEGERS, 'its pixels have a sign or 32 bits; save it with 8 or 16 bits'),
    'planes': (PLANES, 'Pillow cannot read separate planes of 16 bits; save it as PNG'),
    'HEIC': (HEIC, UNKNOWN),
    'nothing': (b'', UNKNOWN),
    'a web page': (b'<html>404</html>', UNKNOWN),
}


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(UserError, match='it is a folder; give the pictures in it'):
        read_picture(tmp_path)


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_no_picture_gets_one_line(case, tmp_path):
    content, reason = REFUSED[case]
    assert refuse(content, tmp_path / 'picture.jpg') == reason


def test_odd_headers_get_one_line(tmp_path):
    assert 'thirty' in refuse(b'P6\n30 thirty\n255\n', tmp_path / 'a.ppm')
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    content = save(Image.fromarray(noise), 'PNG')
    second = content.index(b'IDAT', content.index(b'IDAT') + 4)
    assert refuse(content[:second] + b'\xa9\x8a\xbc\7' + content[second + 4 :], tmp_path / 'a.png')


def test_too_many_megapixels_get_one_line(tmp_path, monkeypatch):
    """187 are too many for Pillow. From 90 on, it warns; that is kept from users."""
    line = refuse(png(8, [0], 0, size=(15000, 12500))[:60], tmp_path / 'bomb.png')
    assert line.startswith('Image size (187500000 pixels) exceeds limit of ')
    assert line.endswith(' Save a smaller copy')
    Image.new('RGB', (WIDTH, HEIGHT), ORANGE).save(tmp_path / 'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', WIDTH * HEIGHT - 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert tuple(read_picture(tmp_path / 'large.png')[0, 0]) == ORANGE


def test_a_missing_file_gets_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r'nowhere\.png: cannot be read as a picture: .*No such file'
    ):
        read_picture(tmp_path / 'nowhere.png')


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8))
KINDS = {
    kind: save(NOISE, kind) for kind in ('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'TGA')
}


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1))
def test_half_a_picture_is_no_picture(kind, share):
    """A truncated file is refused, unless nothing of the picture is missing."""
    whole = KINDS[kind]
    part = whole[: int(share * len(whole))]
    try:
        picture = read_picture(io.BytesIO(part))
    except UserError:
        return
    assert np.array_equal(picture, read_picture(io.BytesIO(whole)))


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
)
def test_no_damage_to_a_picture_ends_in_a_traceback(kind, place, value):
    damaged = bytearray(KINDS[kind])
    damaged[int(place * len(damaged))] = value
    try:
        assert read_picture(io.BytesIO(damaged)).shape == (32, 32, 3)
    except UserError as error:
        assert '\n' not in str(error)


#### Folders #######################################################################################


def touch(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_pictures_are_found_in_the_order_of_sorted(tmp_path):
    touch(tmp_path, 'b/2.png', 'b/10.JPG', 'a/x/y.WebP', 'a/z.tif', 'B/1.jpeg', '10/a.gif')
    pictures, others = find_pictures(tmp_path)
    found = {
        name: [path.removeprefix(f'{tmp_path}/') for path in paths]
        for name, paths in pictures.items()
    }
    assert list(found) == ['10', 'B', 'a', 'b']  # as torchvision numbers classes
    assert found['a'] == ['a/z.tif', 'a/x/y.WebP'] and found['b'] == ['b/10.JPG', 'b/2.png']
    assert not others


def test_hidden_files_and_folders_are_skipped(tmp_path):
    touch(tmp_path, 'cat/1.png', 'dog/1.png', '.DS_Store', 'cat/Thumbs.db', 'desktop.ini')
    touch(tmp_path, '.git/1.png', '.ipynb_checkpoints/1.png', '__MACOSX/1.png', '@eaDir/1.png')
    touch(tmp_path, 'cat/._1.jpg', 'cat/.ipynb_checkpoints/1-checkpoint.png', 'dog/.x/1.png')
    pictures, others = find_pictures(tmp_path)
    expected = {name: [f'{tmp_path}/{name}/1.png'] for name in ('cat', 'dog')}
    assert pictures == expected and not others


def test_files_of_other_kinds_are_counted(tmp_path):
    touch(tmp_path, 'cat/1.HEIC', 'cat/2.heic', 'cat/x/clip.mov', 'cat/noname', 'list.csv', 'a.png')
    pictures, others = find_pictures(tmp_path)
    counts = {'.heic': 2, '.mov': 1, 'without suffix': 1, 'outside the classes': 2}
    assert pictures == {'cat': []} and others == counts


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, 'set/cat/1.png', 'elsewhere/2.png')
    cat = tmp_path / 'set' / 'cat'
    (cat / 'itself').symlink_to(cat)
    (cat / 'more').symlink_to(tmp_path / 'elsewhere')
    (cat / 'again').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'set' / 'dog').symlink_to(tmp_path / 'elsewhere')
    assert find_files(cat) == [(str(cat), '1.png'), (f'{cat}/again', '2.png')]
    assert [len(paths) for paths in find_pictures(tmp_path / 'set')[0].values()] == [2, 1]


def test_a_name_may_be_written_in_two_ways(tmp_path):
    """macOS takes letters with accents apart."""
    touch(tmp_path, 'caf\u00e9/1.png', 'cafe\u0301/2.png', '\u72d7/1.png')
    pictures, _ = find_pictures(tmp_path)
    assert {name: len(paths) for name, paths in pictures.items()} == {'caf\u00e9': 2, '\u72d7': 1}
