"""Names that a recipe and the readers of its data share; importing this module imports nothing."""

TEMPLATES = ("auto", "plain", "qwen2_base", "vicuna_v1", "chatml")  # see `cdistill.data.templates`
TEMPLATE_FILE = ".jinja"  # what the path of a template of one's own ends in
