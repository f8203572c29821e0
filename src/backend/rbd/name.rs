//! The name of an image: `POOL[/NAMESPACE]/IMAGE[@SNAP]`, as in Ceph's own commands.

use std::fmt;
use std::str::FromStr;

/// An image, or a snapshot of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdName {
    /// The pool.
    pub pool: String,
    /// The namespace in the pool; empty: none.
    pub namespace: String,
    /// The image.
    pub image: String,
    /// The snapshot, if the name is of one.
    pub snapshot: Option<String>,
}

impl FromStr for RbdName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || Err("use POOL/IMAGE, POOL/NAMESPACE/IMAGE, and @SNAP after it for a snapshot".to_string());
        let parts: Vec<&str> = text.split('/').collect();
        let (pool, namespace, rest) = match parts[..] {
            [pool, rest] => (pool, None, rest),
            [pool, namespace, rest] => (pool, Some(namespace), rest),
            _ => return wrong(),
        };
        let (image, snapshot) = match rest.split_once('@') {
            Some((image, snapshot)) => (image, Some(snapshot)),
            None => (rest, None),
        };
        let parts = [Some(pool), namespace, Some(image), snapshot];
        let is_invalid = |part: &str| part.is_empty() || part.contains(['\0', '@']);
        if parts.into_iter().flatten().any(is_invalid) {
            return wrong();
        }
        Ok(RbdName {
            pool: pool.to_string(),
            namespace: namespace.unwrap_or_default().to_string(),
            image: image.to_string(),
            snapshot: snapshot.map(str::to_string),
        })
    }
}

impl fmt::Display for RbdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.pool)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.image)?;
        self.snapshot.as_ref().map_or(Ok(()), |snapshot| write!(f, "@{snapshot}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_valid_name_parses_to_itself() {
        for text in ["rbd/disk", "p/n/i", "p/i@s", "p/n/i@s", "p/ä disk:#%\"'\\ 100%", "p.1/n 2/i-3@s:4"] {
            assert_eq!(text.parse::<RbdName>().unwrap().to_string(), text);
        }
        let name: RbdName = "p/n/i@s".parse().unwrap();
        assert_eq!((&*name.pool, &*name.namespace, &*name.image), ("p", "n", "i"));
        assert_eq!(name.snapshot.as_deref(), Some("s"));
        assert_eq!("p/i".parse::<RbdName>().unwrap().namespace, "");
    }

    #[test]
    fn an_invalid_name_is_refused() {
        for text in ["", "i", "/i", "p/", "p//i", "p/i@", "p/@s", "a/b/c/d", "p/i@s@t", "p@s/i", "p/i\0", "p/n@s/i"] {
            let error = text.parse::<RbdName>().unwrap_err();
            assert!(error.contains("POOL/IMAGE"), "{text}: {error}");
        }
    }
}
