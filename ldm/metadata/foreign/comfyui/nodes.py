"""The classes of ComfyUI's nodes that are understood, and the inputs that link one to the next."""

from __future__ import annotations

TOWARDS_START = (
    "images", "image", "samples", "latent_image", "pixels", "samples1", "samples_to", "image1", "destination",
    "input_image", "inpainted_image",
)  # fmt: skip
TOWARDS_MODEL = ("model", "model1", "basic_pipe", "pipe")
TOWARDS_TEXT = ("conditioning", "conditioning_1", "conditioning_to")
SAMPLERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "KSampler (Efficient)"}
RESIZERS = {"LatentUpscale", "LatentUpscaleBy", "ImageScale", "ImageScaleBy", "ImageUpscaleWithModel"}
ENCODERS = {"VAEEncode", "VAEEncodeForInpaint", "VAEEncodeTiled", "InpaintModelConditioning"}
MASKED = {"VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning"}
KEEP_SIZE = SAMPLERS | ENCODERS | {
    "VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "Reroute", "RepeatLatentBatch", "LatentFromBatch",
    "ImageFromBatch", "SetLatentNoiseMask", "ImageSharpen", "ImageBlur",
}  # fmt: skip
# a node of any other class is named in a note
UNDERSTOOD = SAMPLERS | {
    "CLIPTextEncode", "ConditioningZeroOut", "EmptyLatentImage", "VAEDecode", "VAEEncode", "LoadImage",
    "CheckpointLoaderSimple", "CheckpointLoader|pysssss", "UNETLoader", "LoraLoader", "LoraLoaderModelOnly",
    "LoraLoader|pysssss", "Power Lora Loader (rgthree)", "Lora Loader Stack (rgthree)", "Efficient Loader",
    "CR Apply LoRA Stack", "CR LoRA Stack", "LoRA Stacker", "SaveImage", "PreviewImage", "Reroute", "LatentUpscale",
    "LatentUpscaleBy", "ImageScale", "ImageScaleBy", "RepeatLatentBatch", "LatentFromBatch", "ImageFromBatch",
    "VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning", "CLIPSetLastLayer", "ToBasicPipe",
    "FromBasicPipe", "ImpactSwitch", "Any Switch (rgthree)", "ComfySwitchNode", "LoadImageMask", "InvertMask",
    "LoadImageOutput", "RandomNoise", "DisableNoise", "BasicGuider", "CFGGuider", "BasicScheduler", "KarrasScheduler",
    "ExponentialScheduler", "PolyexponentialScheduler", "LaplaceScheduler", "VPScheduler", "BetaSamplingScheduler",
    "SDTurboScheduler", "AlignYourStepsScheduler", "GITSScheduler", "IPAdapterUnifiedLoader",
}  # fmt: skip
NO_FILE = {"", "none", "[none]", "baked vae"}  # file names that mean "no file"
