from src.data import judge, load_cot, parse_preset, save_predictions  # noqa
