"""Clips in and out of files."""

from tav_opt.video.comments import settings_of
from tav_opt.video.files import Clip, check_out, decode, encode_mp4, read, write, write_encoded, write_png

__all__ = ["Clip", "check_out", "decode", "encode_mp4", "read", "settings_of", "write", "write_encoded", "write_png"]
