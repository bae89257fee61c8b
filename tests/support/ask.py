"""An application: streams prompts through the client library and prints what came, for tests that run it elsewhere.

python -m tests.support.ask ADDRESS TOKEN_FILE CA PROMPTS_FILE COUNT MAX_TOKENS
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tidemill import Client, Tls


def main() -> None:
    address, token_file, ca, prompts_file, count, max_tokens = sys.argv[1:]
    prompts = [json.loads(line)["prompt"] for line in Path(prompts_file).read_text().splitlines()][: int(count)]

    def ask(number: int) -> dict[str, object]:
        tokens: list[int] = []
        for chunk in client.stream(
            prompts[number], max_tokens=int(max_tokens), temperature=0.8, seed=number, ignore_eos=True
        ):
            tokens += chunk.tokens
            if len(tokens) > 10 and not started.exists():
                started.touch()
        assert chunk.summary is not None
        route = chunk.summary.route
        return {
            "tokens": tokens,
            "retries": route.retries,
            "verify": route.verify_worker,
            "prefill": route.prefill_worker,
        }

    started = Path("tokens-are-coming")
    token = Path(token_file).read_text().strip()
    with Client(address, token=token, tls=Tls(Path(ca)), timeout=90.0) as client, ThreadPoolExecutor(8) as threads:
        print(json.dumps(list(threads.map(ask, range(len(prompts))))))


if __name__ == "__main__":
    main()
