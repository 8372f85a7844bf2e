"""Images, videos and chat messages to the tensors that Keye-VL takes."""

from __future__ import annotations

from keye_ops.processing.clip import VideoOptions, VideoPatches
from keye_ops.processing.config import ProcessingConfig, detect_version
from keye_ops.processing.decode import ShortVideoError, VideoInfo, decode_frames, probe_video
from keye_ops.processing.image import (
    ImagePatches,
    load_image,
    normalize,
    patchify,
    process_image,
    unpatchify,
)
from keye_ops.processing.messages import split_messages
from keye_ops.processing.processor import KeyeInputs, KeyeProcessor
from keye_ops.processing.prompt import (
    DEFAULT_CHAT_TEMPLATE,
    clip_text,
    expand_placeholders,
    frames_text,
    load_chat_template,
    render_chat,
)
from keye_ops.processing.resize import processor_resize, smart_resize
from keye_ops.processing.sampling import frame_timestamps, sample_indices
from keye_ops.processing.slow_fast import (
    classify_frames,
    frame_similarity,
    rgb_to_hsv,
    slow_fast_sizes,
)
from keye_ops.processing.tokenizer import KeyeTokenizer
from keye_ops.processing.video import process_video

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "ImagePatches",
    "KeyeInputs",
    "KeyeProcessor",
    "KeyeTokenizer",
    "ProcessingConfig",
    "ShortVideoError",
    "VideoInfo",
    "VideoOptions",
    "VideoPatches",
    "classify_frames",
    "clip_text",
    "decode_frames",
    "detect_version",
    "expand_placeholders",
    "frame_similarity",
    "frame_timestamps",
    "frames_text",
    "load_chat_template",
    "load_image",
    "normalize",
    "patchify",
    "probe_video",
    "process_image",
    "process_video",
    "processor_resize",
    "render_chat",
    "rgb_to_hsv",
    "sample_indices",
    "slow_fast_sizes",
    "smart_resize",
    "split_messages",
    "unpatchify",
]
