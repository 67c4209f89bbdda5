"""What the base model is guided away from where the caller says nothing.

The public implementation has a text of its own (1,719 characters, SHA-256 4515a21f8d12...), which is not copied here.
To compare results with it, pass that text as ``negative_prompt``.
"""

NEGATIVE_PROMPT = (
    "Blurry, low resolution, noisy, grainy, washed out, overexposed or underexposed picture; compression "
    "artifacts, banding, flicker, ghosting, torn or frozen frames, jumps between shots, shaking camera; "
    "watermark, logo, subtitle, caption, border; drawing or plastic skin where a photograph is meant; distorted "
    "anatomy, extra or missing limbs and fingers, melted hands, crossed eyes, faces that change, bodies that "
    "merge, objects that appear from nothing or pass through each other, motion against gravity. Muffled, "
    "distorted or clipped sound, hiss, hum, clicks, echo, silence where something is heard, music that was not "
    "asked for, sound that does not fit the picture. Robotic, slurred, mumbled or stuttering voice, wrong "
    "language, several voices at once, speech out of time with the lips, a mouth that moves without speech."
)
