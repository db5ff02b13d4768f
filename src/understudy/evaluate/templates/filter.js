for (const box of document.querySelectorAll("input.filter")) {
  const section = box.closest("section");
  const shown = section.querySelector(".shown");
  const all = [...section.querySelectorAll(".difference")];
  const texts = all.map((one) => one.textContent.toLowerCase());
  box.hidden = false;
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    all.forEach((one, i) => {
      one.hidden = !words.every((word) => texts[i].includes(word));
      count += !one.hidden;
    });
    shown.textContent = words.length ? `${count} of ${all.length} found` : "";
  });
}
