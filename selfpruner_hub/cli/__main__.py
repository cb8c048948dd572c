"""`python -m selfpruner_hub.cli`."""

import sys

from selfpruner_hub.cli.main import main

sys.exit(main())
