"""Pictures from files, as a viewer shows them, and folders of pictures."""

import io
import os
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from lab.errors import UserError, first_lines

# What `read_picture` does. Sets and saved networks keep this line, so change it with the code.
PREPARATION = 'upright, transparency on white, sRGB, squeezed to 32 x 32 with bicubic antialiasing'

#### One picture ###################################################################################

TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANAR = 258, 262, 284  # numbers of TIFF's tags
WHITE_IS_ZERO = 0
SEPARATE_PLANES = 2


def read_picture(path):
    """A picture file as uint8 (32, 32, 3), as a viewer shows it. Training and `lab predict` use it.

    The picture is turned as its EXIF data says, put on white where it is transparent, brought to
    sRGB if it has a colour profile, and squeezed into a square, so that nothing is cut off. Of an
    animation, this is the first frame.

    Raises UserError if it cannot be read, or if viewers would disagree on what it shows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about odd metadata, and about many megapixels
            with Image.open(path) as image:
                return np.asarray(prepare(image))
    except Exception as error:  # broken pictures fail in many ways
        reason = explain(error)
        raise UserError(f'{path}: cannot be read as a picture: {reason}') from error


def explain(error):
    """Why a picture cannot be read, in one line."""
    line = first_lines(error)
    if isinstance(error, IsADirectoryError):
        return 'it is a folder; give the pictures in it'
    if isinstance(error, UnidentifiedImageError):
        return 'it is damaged, or of a kind that Pillow does not know; save it as JPEG or PNG'
    if isinstance(error, Image.DecompressionBombError):
        return f'{line} Save a smaller copy'
    return line


def prepare(image):
    """An image as 32 x 32 pixels of RGB."""
    # A large JPEG is decoded at a half, a quarter or an eighth of its size. For a phone's photos,
    # that takes a fifth of the time, and changes the result by 1 or 2 of 255 at most.
    image.draft(image.mode, (256, 256))
    scale_transparent_colour(image)
    check_tiff_planes(image)
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    profile = image.info.get('icc_profile')
    if image.mode.startswith('I'):
        image = reduce_bits(image)
    elif image.mode == 'F':
        raise ValueError('its pixels are no whole numbers; save it with 8 or 16 bits')
    # Before resizing: the hidden colours of transparent pixels must not mix with their neighbours'.
    image = to_srgb(put_on_white(image), profile)
    if turn is not None:
        image = image.transpose(turn)
    return image.resize((32, 32), Image.Resampling.BICUBIC)


def scale_transparent_colour(image):
    """Bring a PNG's transparent colour to 8 bits, like the pixels. Pillow leaves it as in the file.

    16-bit grey keeps its pixels, and so does its transparent colour.
    """
    colour = image.info.get('transparency')
    if image.format != 'PNG' or colour is None:
        return
    packing = image.tile[0][3]
    if packing in ('L;2', 'L;4'):
        image.info['transparency'] = colour * 255 // (2 ** int(packing[-1]) - 1)
    elif packing == 'RGB;16B':
        image.info['transparency'] = tuple(value // 256 for value in colour)


def check_tiff_planes(image):
    """Raise ValueError for TIFFs whose planes of 16 bits Pillow would read as if they had 8."""
    if image.format != 'TIFF' or image.info.get('compression') != 'raw':
        return
    bits = image.tag_v2.get(TIFF_BITS, (1,))
    if image.tag_v2.get(TIFF_PLANAR) == SEPARATE_PLANES and max(bits) > 8:
        raise ValueError(f'Pillow cannot read separate planes of {max(bits)} bits; save it as PNG')


def reduce_bits(image):
    """Grey of up to 16 bits as grey of 8 bits, perhaps with transparency."""
    if image.mode == 'I' and image.format not in ('PNG', 'PPM'):  # there, it holds 16 bits
        raise ValueError('its pixels have a sign or 32 bits; save it with 8 or 16 bits')
    pixels = np.asarray(image).astype(np.uint32)
    white = 65535
    if image.format == 'TIFF':
        white = 2 ** image.tag_v2[TIFF_BITS][0] - 1
    grey = (255 * pixels + white // 2) // white
    if image.format == 'TIFF' and image.tag_v2.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow does this for 8 bits only
    reduced = Image.fromarray(grey.astype(np.uint8))
    if 'transparency' in image.info:
        opaque = pixels != image.info['transparency']
        reduced.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return reduced


def put_on_white(image):
    """An image without transparency: it lies on white, as in most viewers."""
    if not image.has_transparency_data:
        return image
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')


def to_srgb(image, profile):
    """An image as RGB. profile: an ICC profile, as bytes, or None."""
    if image.mode not in ('L', 'CMYK'):
        image = image.convert('RGB')
    if profile:
        try:
            srgb = ImageCms.createProfile('sRGB')
            return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode='RGB')
        except ImageCms.PyCMSError:
            pass  # Viewers ignore a profile that is damaged, or for other colours than the image's.
    return image.convert('RGB')


#### Folders of pictures ###########################################################################

SUFFIXES = set(
    '.apng .avif .bmp .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo .pbm .pgm .png .pnm '
    '.ppm .psd .tga .tif .tiff .webp'.split()
)
SYSTEM_FILES = ('Thumbs.db', 'desktop.ini', '__MACOSX', '__pycache__', '@eaDir')


def is_hidden(name):
    return name.startswith('.') or name in SYSTEM_FILES


def stop(error):
    raise error


def find_files(folder):
    """(folder, name) of all files in a folder and its subfolders, sorted, without hidden ones.

    Follows links, but enters every folder once.
    """
    files = []
    entered = {os.path.realpath(folder)}
    for root, subfolders, names in os.walk(folder, onerror=stop, followlinks=True):
        subfolders.sort()  # so that of two links to a folder, the same one is entered everywhere
        for name in list(subfolders):
            place = os.path.realpath(os.path.join(root, name))
            if is_hidden(name) or place in entered:
                subfolders.remove(name)
            entered.add(place)
        files += [(root, name) for name in names if not is_hidden(name)]
    return sorted(files)


def find_pictures(folder):
    """The pictures in folder/CLASS/*: {class: paths}, and how many files have which other suffix.

    The classes are in the order of `sorted`.
    """
    pictures = {}
    others = Counter()
    for entry in sorted(os.listdir(folder)):
        if is_hidden(entry):
            continue
        if not os.path.isdir(os.path.join(folder, entry)):
            others['outside the classes'] += 1
            continue
        # File systems write é in two ways.
        paths = pictures.setdefault(unicodedata.normalize('NFC', entry), [])
        for root, name in find_files(os.path.join(folder, entry)):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                paths.append(os.path.join(root, name))
            else:
                others[suffix or 'without suffix'] += 1
    return dict(sorted(pictures.items())), others
