// The wishes of a request, as fields of its body, from what is typed: [name, kind, text] each. An empty one is no
// wish. A comma of any script separates words of a list.
export function wishesOf(typed) {
  const made = typed.map(([name, kind, text]) => {
    if (kind === "number") return [name, text.trim() === "" ? null : Number(text)];
    if (kind !== "list") return [name, text || null];
    const terms = text.split(/[,，、،]/).map((term) => term.trim()).filter(Boolean);
    return [name, terms.length ? [...new Set(terms)] : null];
  });
  return Object.fromEntries(made.filter(([, value]) => value !== null));
}
