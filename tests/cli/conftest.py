from commands import call, recipe, run_folder, words  # noqa: F401
