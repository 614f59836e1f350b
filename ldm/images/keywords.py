"""The keywords of the text chunks in which a PNG file records how its image was made."""

INFOTEXT_KEYWORD = "parameters"  # the text of AUTOMATIC1111's web UI
RECORD_KEYWORD = "ldm"  # this toolkit's exact record of the job, as JSON
