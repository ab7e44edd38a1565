"""WebShop (Yao et al. 2022) as text: find, configure and buy the product that an instruction asks for."""

from agentrl.envs import register

register(
    "WebShop-v0",
    "environments.webshop.env:WebShopEnv",
    max_turns=15,
    summary="search a web shop, choose product and options, buy what the instruction asks for",
    agents={"random": "random", "naive": "webshop-naive", "expert": "webshop-expert"},
)
