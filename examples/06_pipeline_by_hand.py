"""The stages of `AutoPruner.prune`, called one by one. The best seed takes the place of a search.

python examples/06_pipeline_by_hand.py HuggingFaceTB/SmolLM2-135M-Instruct [CALIBRATION_TOKENS]
"""

import sys

from selfpruner_hub.calibration.corpus import load_corpus
from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.importance import rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.output_repair import first_repairs
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model
from selfpruner_hub.pruning.temperature import match_confidence

name, tokens = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 32_768
model, tokenizer = load_model(name)
text = load_corpus("wikitext2", tokenizer, tokens=tokens + tokens // 8, window=min(512, tokens // 8))
calibration, fitness_text = (part.windows for part in text.split(tokens, tokens // 8))

fisher = output_fisher(model, calibration[:16])  # which errors of an output change the loss
statistics = calibrate(model, calibration)  # second moments of the inputs of o_proj and down_proj
order = rank(model, statistics, fisher=fisher)  # channels and KV groups, most important first
repairs = first_repairs(model, order, statistics, fisher)  # closed forms for every width
budget = Budget(shape_of(model.config), share=0.3)
with ordered(model, order):
    score = Fitness(slicer := Slicer(model, repairs), fitness_text)  # KL divergence from the dense model
    plans = [budget.project(rates) for rates in seeds(budget, slicer.loss_curves(), score.loss).values()]
    pruned = slice_model(slicer, min(plans, key=score))
compensate(model, pruned, calibration, fisher=fisher)  # the second repair
match_confidence(model, pruned, fitness_text)  # one factor for all logits
pruned.save_pretrained("pruned-by-hand")
print(f"{pruned.num_parameters():,} of {model.num_parameters():,} parameters are left.")
