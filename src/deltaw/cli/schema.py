"""deltaw schema: the JSON schema of a training configuration."""

import json

from deltaw.cli.app import Json, app


@app.command()
def schema(as_json: Json = True) -> None:
    """Print the JSON schema of configuration files, with every registered method."""
    from deltaw.config.describe import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
