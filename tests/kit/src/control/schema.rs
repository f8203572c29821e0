//! Compares a value with the types of the control protocol's schema (`query-qmp-schema`).

use serde_json::Value;

/// Whether the empty word is of every enum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyWord {
    /// A fake disk leaves words out.
    Allowed,
    /// A real daemon has a word for each member.
    Refused,
}

/// The entry of a type, a command or an event.
pub fn entry<'a>(schema: &'a [Value], name: &str) -> &'a Value {
    let found = schema.iter().find(|entry| entry["name"] == name);
    found.unwrap_or_else(|| panic!("the schema has no '{name}'"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

/// Returns why a value is not of this type. `None`: it is.
pub fn type_fault(schema: &[Value], kind: &str, value: &Value, empty: EmptyWord) -> Option<String> {
    let entry = entry(schema, kind);
    let wrong = || Some(format!("{value} is not of the type {kind}"));
    let fault_of = |kind: &Value, value: &Value| type_fault(schema, text(kind), value, empty);
    match text(&entry["meta-type"]) {
        "builtin" => {
            let right = match kind {
                "str" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "number" => value.is_number(),
                "bool" => value.is_boolean(),
                _ => value.is_null(),
            };
            if right { None } else { wrong() }
        }
        "enum" => {
            let known = entry["values"].as_array().expect("a list").contains(value);
            if known || value == "" && empty == EmptyWord::Allowed { None } else { wrong() }
        }
        "array" => {
            let Some(list) = value.as_array() else { return wrong() };
            list.iter().find_map(|value| fault_of(&entry["element-type"], value))
        }
        "alternate" if value.is_null() => None,
        "alternate" => fault_of(&entry["members"][0]["type"], value),
        _ => {
            let Some(given) = value.as_object() else { return wrong() };
            let members = entry["members"].as_array().expect("a list");
            let unknown = given.keys().find(|name| !members.iter().any(|member| member["name"] == **name));
            if let Some(name) = unknown {
                return Some(format!("{kind} has no member '{name}' in the schema"));
            }
            members.iter().find_map(|member| match given.get(text(&member["name"])) {
                Some(value) => fault_of(&member["type"], value),
                None if member.get("default").is_some() => None,
                None => Some(format!("{value} lacks the member {} of {kind}", member["name"])),
            })
        }
    }
}
