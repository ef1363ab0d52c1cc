// Two comforts, neither needed: a switch between light and dark, and values that also open by touch.
(() => {
  const root = document.documentElement;
  const remember = (value) => { try { localStorage.setItem("mergewell-theme", value); } catch { } };
  const recall = () => { try { return localStorage.getItem("mergewell-theme"); } catch { return null; } };
  const held = recall();
  if (held === "light" || held === "dark") root.dataset.theme = held;

  const themeSwitch = () => {
    const button = document.getElementById("theme");
    const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.hidden = false;
    name();
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      remember(root.dataset.theme);
      name();
    });
  };

  const tips = () => {
    for (const title of document.querySelectorAll("svg title")) {
      title.parentElement.dataset.tip = title.textContent;
      title.remove();
    }
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    document.body.append(tip);
    const hide = () => { tip.hidden = true; };
    const show = (event) => {
      const owner = event.target.closest("[data-tip]");
      if (!owner) return hide();
      tip.textContent = owner.dataset.tip;
      tip.hidden = false;
      const box = owner.getBoundingClientRect();
      const room = root.clientWidth - tip.offsetWidth - 8;
      const above = box.top - tip.offsetHeight - 8;
      tip.style.left = Math.max(8, Math.min(event.clientX - tip.offsetWidth / 2, room)) + "px";
      tip.style.top = (above > 8 ? above : box.bottom + 8) + "px";
    };
    document.addEventListener("pointerover", show);
    document.addEventListener("pointermove", show);
    document.addEventListener("pointerdown", show);
    document.addEventListener("scroll", hide, { passive: true });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  };

  document.addEventListener("DOMContentLoaded", () => { themeSwitch(); tips(); });
})();
