//! Parses a reply of the guest's agent within bounds, because an attacker in the guest may have written it. The result
//! has only the members that we use, and no more than `MAX_VALUES` values.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// The most values in a reply. A guest with thousands of filesystems needs as many; each takes well below a kilobyte.
const MAX_VALUES: u32 = 50_000;
/// The members of objects that the result has; all others are skipped.
const MEMBERS: [&str; 10] =
    ["return", "error", "class", "desc", "id", "name", "type", "enabled", "supported_commands", "buf-b64"];

/// Parses one JSON text. Fails if it is not JSON, or has too many values.
pub fn parse(text: &[u8]) -> Result<Value, serde_json::Error> {
    let left = Cell::new(MAX_VALUES);
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = Bounded { left: &left }.deserialize(&mut json)?;
    json.end()?;
    Ok(value)
}

#[derive(Clone, Copy)]
struct Bounded<'a> {
    /// How many more values are allowed.
    left: &'a Cell<u32>,
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        let Some(left) = self.left.get().checked_sub(1) else { return Err(D::Error::custom("too many values")) };
        self.left.set(left);
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = from.next_element_seed(self)? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(name) = from.next_key::<String>()? {
            if MEMBERS.contains(&name.as_str()) {
                let value = from.next_value_seed(self)?;
                members.insert(name, value);
            } else {
                from.next_value::<IgnoredAny>()?;
            }
        }
        Ok(members.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parsing_keeps_only_members_that_are_used_and_a_bounded_number() {
        let text =
            br#"{"return": [{"name": "a\u00e9", "disk": [1, 2, {"dev": 3}], "type": "ext4"}, -1, 1.5, null, true]}"#;
        assert_eq!(parse(text).unwrap(), json!({"return": [{"name": "aé", "type": "ext4"}, -1, 1.5, null, true]}));
        let list = |count: usize| [b"{\"return\": [".to_vec(), b"1,".repeat(count), b"1]}".to_vec()].concat();
        assert!(parse(&list(40_000)).is_ok());
        assert!(parse(&list(60_000)).unwrap_err().to_string().contains("too many values"));
        // Read and dropped.
        assert!(parse(&[b"{\"x\": ".to_vec(), list(1_000_000), b"}".to_vec()].concat()).is_ok());
        for bad in [&b"["[..], b"", b"{} {}", b"{\"return\": nonsense}", &b"[".repeat(2_000_000)] {
            assert!(parse(bad).is_err());
        }
    }
}
